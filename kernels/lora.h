// Params of lora.cu.
#pragma once
#include "linear.h"
