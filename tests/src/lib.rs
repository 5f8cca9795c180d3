//! What the tests of real kernels share.
