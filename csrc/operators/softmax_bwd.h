// The arguments of eq. (5), checked: of softmax_bwd, and of conv_block_logits_bwd, which goes on to
// it.
#pragma once

#include "checks.h"

namespace gpl_fast {

// fused: what dy would hold is computed in the same kernel.
SoftmaxBwd softmax_bwd_args(const Tensor& x, int64_t activation, double temperature, int64_t row0,
                            int64_t rows, const Tensor& dx, double label_smoothing,
                            const MaybeTensor& lse, const MaybeTensor& dy, const MaybeTensor& scale,
                            const MaybeTensor& valid, const MaybeTensor& ce_labels,
                            const MaybeTensor& ce_mask, const MaybeTensor& ce_lse,
                            const MaybeTensor& ce_scale, const MaybeTensor& class_weight,
                            bool fused);

}  // namespace gpl_fast
