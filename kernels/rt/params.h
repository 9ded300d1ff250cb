// What the params structs of kernels are made of. Needs only <stdint.h>, so that bindgen reads it without CUDA.
#pragma once
#include <stdint.h>

// An address in device memory: typed in a kernel, a number in Rust.
#ifdef BRIGHTRUN_BINDGEN
#define PTR(T) uint64_t
#else
#define PTR(T) T*
#endif
