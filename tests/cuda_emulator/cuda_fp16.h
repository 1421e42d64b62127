#pragma once
#include <torch/headeronly/util/Half.h>

#include "cuda_runtime.h"

using __half = c10::Half;
