"""From kernels to code: instruction sets, LLVM, compile processes, the library of kernels."""
