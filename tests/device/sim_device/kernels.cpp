// What the simulated devices compute: the host's kernels, on memory that only these see.
#include <ATen/EmptyTensor.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <c10/core/CPUAllocator.h>

#include <unordered_set>

#include "device.h"

namespace sim {

using at::Tensor, c10::Device, c10::IntArrayRef, torch::CppFunction;
template <class T>
using Maybe = std::optional<T>;
using Names = std::unordered_set<std::string>;
constexpr auto kBackend = c10::BackendComponent::PrivateUse1Bit, kHost = c10::BackendComponent::CPUBit;
const c10::DispatchKeySet kOnHost(c10::DispatchKey::CPU);
// The bit of the host is the lower one and changes no dispatch. But it lets the data of a parameter be set to a tensor
// elsewhere, as with CUDA; else Module.to would make new parameters, and untie those that are shared.
const auto kOnDevice = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1) | c10::DispatchKeySet(kHost);

bool is_ours(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == kType; }

// A view is tracked by autograd, or made in inference mode, as what it is a view of.
c10::DispatchKeySet with(const Tensor& tensor, c10::BackendComponent backend) {
  return (tensor.key_set() - c10::python_ks).remove_backend(kBackend) | c10::DispatchKeySet(backend);
}

Tensor view(const c10::Storage& storage, const Tensor& shape, c10::DispatchKeySet keys) {
  auto result =
      at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(storage), keys, shape.dtype());
  result.unsafeGetTensorImpl()->set_storage_offset(shape.storage_offset());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(shape.sizes(), shape.strides());
  return result;
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, Maybe<c10::ScalarType> dtype, Maybe<c10::Layout>,
                     Maybe<Device> device, Maybe<bool>) {
  c10::DeviceGuard guard(resolve(device));
  auto* memory = c10::GetAllocator(kType);
  return Tensor(at::detail::empty_strided_generic(size, stride, memory, kOnDevice, c10::dtype_or_default(dtype)));
}

Tensor empty(IntArrayRef size, Maybe<c10::ScalarType> dtype, Maybe<c10::Layout>, Maybe<Device> device, Maybe<bool>,
             Maybe<c10::MemoryFormat> format) {
  c10::DeviceGuard guard(resolve(device));
  auto* memory = c10::GetAllocator(kType);
  return Tensor(at::detail::empty_generic(size, memory, kOnDevice, c10::dtype_or_default(dtype), format));
}

const Tensor& resized(const Tensor& self, IntArrayRef size, Maybe<c10::MemoryFormat> format) {
  c10::DeviceGuard guard(self.device());
  return at::native::resize_(self, size, format);
}

// The tensors of one call, as the host's kernels see them: the same memory, under the name of the host.
class HostView {
 public:
  Tensor of(const Tensor& ours) {
    for (const auto& [known, seen] : pairs_)
      if (known.is_same(ours)) return seen;
    pairs_.emplace_back(ours, view(storage(ours.storage()), ours, with(ours, kHost)));
    return pairs_.back().second;
  }

  // Return what a kernel of the host gave back as what the device gives back.
  Tensor back(const Tensor& result, Device device) const {
    if (!result.defined()) return result;
    for (const auto& [known, seen] : pairs_)
      if (result.is_same(seen)) return known;
    for (const auto& [known, seen] : pairs_)
      if (seen.storage().is_alias_of(result.storage())) return view(known.storage(), result, with(known, kBackend));
    const auto dense = result.is_non_overlapping_and_dense() ? result : result.contiguous();
    const auto made = empty_strided(dense.sizes(), dense.strides(), dense.scalar_type(), {}, device, {});
    HostView().of(made).copy_(result);
    return made;
  }

  // Let those follow that a kernel has given another size.
  void settle() const {
    for (const auto& [known, seen] : pairs_) {
      if (known.sizes() == seen.sizes() && known.storage().data() == seen.storage().data()) continue;
      resized(known, seen.sizes(), {});
      HostView().of(known).copy_(seen);
    }
  }

 private:
  c10::Storage storage(const c10::Storage& ours) {
    for (const auto& [known, seen] : pairs_)
      if (known.storage().is_alias_of(ours)) return seen.storage();
    c10::DataPtr data(ours.mutable_data(), Device(c10::kCPU));
    return c10::Storage(c10::Storage::use_byte_size_t(), ours.nbytes(), std::move(data), c10::GetCPUAllocator(), true);
  }

  std::vector<std::pair<Tensor, Tensor>> pairs_;  // on the device, on the host
};

// ---- every operation that has no kernel of its own

// A number on the host may stand beside tensors of the device, as on CUDA: in what torch calls pointwise, and in these.
bool takes_host_numbers(const c10::OperatorHandle& op) {
  static const Names names{"fill_", "masked_fill_", "index_fill_", "_index_put_impl_", "where", "rsub", "floor_divide",
      "floor_divide_", "eq_", "ne_", "lt_", "le_", "gt_", "ge_", "copysign_", "heaviside_", "gcd_", "lcm_",
      "_fused_adam_", "_fused_adamw_", "_fused_sgd_"};
  const auto name = op.schema().name().substr(6);  // after "aten::"
  return op.hasTag(at::Tag::pointwise) || name.rfind("_foreach_", 0) == 0 || names.count(name) > 0;
}

// The size of their results is in the values.
bool waits(const c10::OperatorHandle& op) {
  static const Names names{"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal", "aten::unique_dim",
      "aten::unique_consecutive"};
  return names.count(op.schema().name()) > 0;
}

// Return the one device of all arguments, and refuse others.
Device device_of(const c10::OperatorHandle& op, const c10::ArrayRef<c10::IValue> arguments) {
  Maybe<Device> found;
  for (auto value : arguments) {
    if (value.isDevice()) found = resolve(value.toDevice());
    each_tensor(value, [&found](const Tensor& tensor) {
      if (!found && is_ours(tensor)) found = tensor.device();
      return tensor;
    });
  }
  const auto device = resolve(found);
  for (size_t index = 0; index < arguments.size(); ++index) {
    const auto& argument = op.schema().arguments()[index];
    const bool written = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
    auto value = arguments[index];
    each_tensor(value, [&](const Tensor& tensor) {
      const bool is_number = tensor.defined() && tensor.dim() == 0 && !written && takes_host_numbers(op);
      const bool is_index = argument.name() == "indices" && op.schema().name().find("index") != std::string::npos;
      const bool may_differ = !tensor.defined() || (tensor.device().is_cpu() && (is_number || is_index));
      TORCH_CHECK(may_differ || tensor.device() == device,
                  "Expected all tensors to be on the same device, but found at least two devices, ", device, " and ",
                  tensor.device(), "! (when checking argument for argument ", argument.name(), " in method sim_",
                  op.schema().name(), ")");
      return tensor;
    });
  }
  return device;
}

at::Generator drawing_for(const c10::IValue& given, Device device) {
  const auto generator = given.isNone() ? state(device.index()).generator : given.toGenerator();
  TORCH_CHECK(generator.device().type() == kType, "Expected a 'sim' device type for generator but found '",
              generator.device().type(), "'");
  return drawing(generator);
}

void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto num_arguments = schema.arguments().size();
  const auto device = device_of(op, torch::jit::last(*stack, num_arguments));
  c10::DeviceGuard guard(device);
  if (waits(op)) wait(device.index());
  catch_up(device.index());
  count(kKernels, device.index());

  HostView host;
  for (size_t index = 0; index < num_arguments; ++index) {
    auto& value = torch::jit::peek(*stack, index, num_arguments);
    if (schema.arguments()[index].name() == "generator") value = drawing_for(value, device);
    if (value.isDevice()) value = Device(c10::kCPU);
    each_tensor(value, [&host](const Tensor& tensor) { return is_ours(tensor) ? host.of(tensor) : tensor; });
  }
  op.redispatchBoxed(kOnHost, stack);
  host.settle();
  for (size_t index = 0; index < schema.returns().size(); ++index)
    each_tensor(torch::jit::peek(*stack, index, schema.returns().size()),
                [&](const Tensor& tensor) { return host.back(tensor, device); });
}

// torch sends a device's convolutions to operations of other names.
void convolution(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  run(c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution", ""), stack);
}

void convolution_backward(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  const auto first = stack->end() - 10;  // gradient, input, weight, and here the other one has the sizes of the bias
  const auto weight = first[2].toTensor();
  const auto num_outputs = first[6].toBool() ? weight.size(1) * first[8].toInt() : weight.size(0);
  stack->insert(first + 3, c10::IValue(std::vector<int64_t>{num_outputs}));
  run(c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution_backward", ""), stack);
}

// ---- copies

Tensor copy_from(const Tensor& source, const Tensor& target, bool non_blocking) {
  const bool to_us = is_ours(target), from_us = is_ours(source);
  const int device = (to_us ? target : source).device().index();
  if (source.device() != target.device())
    count(to_us && from_us ? kBetween : to_us ? kToUs : kFromUs, device, source.nbytes());
  if (from_us) catch_up(source.device().index());
  HostView host;
  if (to_us && !from_us && non_blocking && source.is_pinned()) {
    later(device, kToDevice, [source, target] { HostView().of(target).copy_(source); });
  } else if (!to_us && non_blocking && target.is_pinned()) {
    later(device, kToHost, [target, value = host.of(source).clone()] { target.copy_(value); });
  } else {
    if (!to_us || (!from_us && !non_blocking)) wait(device);
    catch_up(device);
    (to_us ? host.of(target) : target).copy_(from_us ? host.of(source) : source);
  }
  return target;
}

c10::Scalar local_scalar_dense(const Tensor& tensor) {
  count(kFromUs, tensor.device().index(), tensor.nbytes());
  wait(tensor.device().index());
  return HostView().of(tensor).item();
}

// ---- what the host has no kernel for, or one that asks for no generator

// With the numbers of the host's dropout, which multiplies with noise.
std::tuple<Tensor, Tensor> dropout(const Tensor& input, double p, Maybe<bool> train) {
  auto noise = at::empty_like(input);
  if (!train.value_or(true) || p == 0 || p == 1) noise.fill_(p != 1);
  else noise.bernoulli_(1 - p).div_(1 - p);
  return {input.mul(noise), noise.ne(0)};
}

Tensor dropout_backward(const Tensor& gradient, const Tensor& mask, double scale) {
  const auto noise = mask.to(gradient.scalar_type());
  return gradient.mul(scale == 0 ? noise : noise.div(1 / scale));
}

bool has(const Maybe<Tensor>& tensor) { return tensor && tensor->defined(); }

std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& input, const Tensor& hidden, const Tensor& cell,
                                             const Maybe<Tensor>& bias, const Maybe<Tensor>& hidden_bias) {
  const auto gates = has(bias) ? input + *bias + (hidden + *hidden_bias) : input + hidden;
  const auto part = gates.chunk(4, 1);
  const auto next = part[1].sigmoid() * cell + part[0].sigmoid() * part[2].tanh();
  return {part[3].sigmoid() * next.tanh(), next, gates};
}

std::tuple<Tensor, Tensor> gru_cell(const Tensor& input, const Tensor& hidden, const Tensor& state,
                                    const Maybe<Tensor>& bias, const Maybe<Tensor>& hidden_bias) {
  const auto from_input = (has(bias) ? input + *bias : input).chunk(3, 1);
  const auto from_state = (has(bias) ? hidden + *hidden_bias : hidden).chunk(3, 1);
  const auto fresh = (from_input[2] + (from_input[0] + from_state[0]).sigmoid() * from_state[2]).tanh();
  return {fresh + (from_input[1] + from_state[1]).sigmoid() * (state - fresh), fresh};
}

// The host has none for integers; CUDA has, and transformers counts tokens by it.
Tensor histc(const Tensor& self, int64_t bins, const c10::Scalar& min, const c10::Scalar& max) {
  count(kKernels, self.device().index());
  catch_up(self.device().index());
  HostView host;
  return host.back(host.of(self).to(at::kDouble).histc(bins, min, max).to(self.scalar_type()), self.device());
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(CppFunction::makeFromBoxedFunction<&run>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("resize_", resized);
  m.impl("set_.source_Storage", static_cast<Tensor& (*)(Tensor&, c10::Storage)>(at::native::set_));
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("_copy_from", copy_from);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("record_stream", [](Tensor&, c10::Stream stream) { count(kRecords, stream.device_index()); });
  m.impl("histc", histc);
  m.impl("native_dropout", dropout);
  m.impl("native_dropout_backward", dropout_backward);
  // For these torch has other kernels, in parts, that it would take first.
  for (const auto* name : {"native_layer_norm", "native_group_norm", "mse_loss", "smooth_l1_loss", "huber_loss"})
    m.impl(name, CppFunction::makeFromBoxedFunction<&run>());
  m.impl("convolution_overrideable", CppFunction::makeFromBoxedFunction<&convolution>());
  m.impl("convolution_backward_overrideable", CppFunction::makeFromBoxedFunction<&convolution_backward>());
}

TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) {
  m.impl("_thnn_fused_lstm_cell", lstm_cell);
  m.impl("_thnn_fused_gru_cell", gru_cell);
}

}  // namespace sim
