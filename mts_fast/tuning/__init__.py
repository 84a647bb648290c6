"""Times the kernels on the user's own machine, for `auto` (`mts-fast tune`)."""
