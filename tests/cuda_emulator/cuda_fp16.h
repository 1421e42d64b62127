#pragma once
#include <torch/headeronly/util/Half.h>

#include "cuda_runtime.h"

using __half = c10::Half;
using half = c10::Half;
using __half2 = Vector<c10::Half, 2>;
using half2 = __half2;
inline float __half2float(__half value) { return value; }
inline __half __float2half(float value) { return value; }
inline __half __float2half_rn(float value) { return value; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline float2 __half22float2(__half2 pair) { return {pair.x, pair.y}; }
