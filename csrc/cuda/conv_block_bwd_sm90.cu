#include "conv_block.cuh"
