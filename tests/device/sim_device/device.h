// What a simulated device is: memory, a generator, counts, and copies that nobody has waited for.
#pragma once

#include <array>
#include <atomic>
#include <functional>
#include <mutex>

#include <ATen/core/Generator.h>
#include <ATen/core/ivalue.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

namespace sim {

constexpr auto kType = c10::DeviceType::PrivateUse1;
constexpr int kNumDevices = 10;
constexpr auto kAll = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);

// In the order of COUNTERS in __init__.py.
enum Counter { kToUs, kFromUs, kBetween, kSyncs, kKernels, kEvents, kStreams, kRecords, kNumCounters };
// A copy to the device is made when the device next does something, one to the host when somebody waits for the device.
enum Direction { kToDevice, kToHost };

struct State {
  std::mutex mutex;
  std::mutex copying;
  std::array<std::atomic<int64_t>, kNumCounters> counts{};
  std::array<std::vector<std::function<void()>>, 2> copies;
  c10::CachingDeviceAllocator::DeviceStats memory;
  size_t limit = size_t{1} << 40;
  at::Generator generator;  // what the user seeds
};

State& state(int device);
at::Generator drawing(const at::Generator& generator);  // the one of the host's kind that draws its numbers
void later(int device, Direction direction, std::function<void()> copy);
size_t catch_up(int device, Direction direction = kToDevice);  // says how many there were
void wait(int device);
// The device that a factory means: the calling thread's current one where it names none.
c10::Device resolve(std::optional<c10::Device> device);

inline void count(Counter counter, int device, size_t number = 1) { state(device).counts[counter] += number; }

// Put what ``visit`` returns in the place of every tensor in a value.
template <class Visit>
void each_tensor(c10::IValue& value, Visit visit) {
  if (value.isTensor()) {
    value = visit(value.toTensor());
  } else if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(visit(tensor));
    value = list;
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const auto& tensor : value.toOptionalTensorVector())
      list.push_back(tensor ? std::optional<at::Tensor>(visit(*tensor)) : std::nullopt);
    value = list;
  }
}

}  // namespace sim
