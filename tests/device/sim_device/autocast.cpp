// Autocast of the simulated devices: a list of their own, as CUDA, XPU and the CPU have theirs.
#include <ATen/autocast_mode.h>

#include "device.h"

namespace sim {

enum Rule { kToLower, kToFull, kToWidest };

bool counts(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == kType && tensor.is_floating_point() &&
      tensor.scalar_type() != at::kDouble;
}

template <Rule rule>
void call(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  c10::impl::ExcludeDispatchKeyGuard off(c10::DispatchKey::AutocastPrivateUse1);
  auto dtype = rule == kToFull ? at::kFloat : at::autocast::get_autocast_dtype(kType);
  const auto each_argument = [&](auto visit) {
    const auto num_arguments = static_cast<int64_t>(op.schema().arguments().size());
    for (auto value = stack->end() - num_arguments; value != stack->end(); ++value) each_tensor(*value, visit);
  };
  each_argument([&dtype](const at::Tensor& tensor) {
    if (rule == kToWidest && counts(tensor)) dtype = at::promote_types(dtype, tensor.scalar_type());
    return tensor;
  });
  each_argument([&dtype](const at::Tensor& tensor) {
    return counts(tensor) ? at::autocast::cached_cast(dtype, tensor, kType) : tensor;
  });
  op.callBoxed(stack);
}

constexpr auto kLower = {"conv1d", "conv1d.padding", "conv2d", "conv2d.padding", "conv3d", "conv3d.padding",
    "conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input", "convolution", "linear", "matmul", "mm",
    "mv", "bmm", "addmm", "addmv", "addbmm", "baddbmm", "chain_matmul", "linalg_multi_dot", "prelu",
    "scaled_dot_product_attention", "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "lstm_cell", "gru_cell",
    "rnn_tanh_cell", "rnn_relu_cell"};
constexpr auto kFull = {"exp", "log", "log10", "log2", "log1p", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "rsqrt",
    "reciprocal", "softplus", "layer_norm", "group_norm", "rms_norm", "softmax.int", "log_softmax.int", "cumsum",
    "prod", "sum", "sum.dim_IntList", "norm.Scalar", "nll_loss", "cross_entropy_loss", "mse_loss", "l1_loss",
    "smooth_l1_loss", "kl_div", "binary_cross_entropy_with_logits", "cdist"};
constexpr auto kWidest = {"addcdiv", "addcmul", "atan2", "bilinear", "cat", "dot", "index_put", "stack", "scatter_add"};

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  for (const auto* name : kLower) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&call<kToLower>>());
  for (const auto* name : kFull) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&call<kToFull>>());
  for (const auto* name : kWidest) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&call<kToWidest>>());
}

}  // namespace sim
