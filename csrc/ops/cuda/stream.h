// The device and stream on which a CUDA kernel is launched, without torch's CUDA headers.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

// weak: a torch without CUDA lacks this symbol, but has no CUDA tensors to call these ops with.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace mts_fast {

// Makes the tensor's device current, and restores the former device at the end of the scope.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const torch::stable::Tensor& tensor) {
    const int32_t device = tensor.get_device_index();
    cudaGetDevice(&before_);
    cudaSetDevice(device);
    void* current = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr &&
                        aoti_torch_get_current_cuda_stream(device, &current) == 0,
                    "mts_fast: torch must be a CUDA build to run CUDA kernels");
    stream = static_cast<cudaStream_t>(current);
  }
  ~OnDeviceOf() { cudaSetDevice(before_); }
  OnDeviceOf(const OnDeviceOf&) = delete;
  OnDeviceOf& operator=(const OnDeviceOf&) = delete;

  cudaStream_t stream;

 private:
  int before_ = 0;
};

inline void check_launch(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": the CUDA kernel must launch, got ",
                  cudaGetErrorString(error));
}

}  // namespace mts_fast
