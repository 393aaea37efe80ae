// Kernels of a GPU that are launched again, with the addresses of other tensors.
#pragma once

#include <Python.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "host/tensors.h"

namespace fastminima {
namespace host {

// The driver's cuLaunchKernel and cuStreamIsCapturing. Addresses replace them, as a test does; null
// brings both back. Without a function for the second one no stream is captured.
void use_driver(void* launch, void* is_capturing);
// Whether there is one: libcuda.so, or what was put in its place.
bool has_driver();
// One that launches nothing and counts, for benchmarks of the host; and its count.
void* counting_driver();
int64_t launches_counted();

// Where an argument of a kernel points to: some bytes after the beginning of an input, of the
// scratch, or of an output.
struct Pointer {
  enum Where { input, scratch, output } where;
  int64_t number, offset;
};

// One launch. An argument takes eight bytes, of which a kernel reads those that it has. Without
// programs in the grid it is a launcher of this library: `Words<launcher>::call`, whose last
// argument is the stream.
struct Launch {
  void* function;
  unsigned grid[3], threads, shared;
  std::vector<uint64_t> arguments;
  std::vector<std::pair<size_t, Pointer>> pointers;  // arguments that are addresses
};

// What a tensor has to be for the launches to be right, down to how its address is aligned.
class Likeness {
 public:
  static constexpr uintptr_t kAlignment = 16;  // what compilers of kernels look at

  explicit Likeness(const dlpack::Tensor& x);
  bool holds(const dlpack::Tensor& x) const;

 private:
  dlpack::Device device_;
  dlpack::Dtype dtype_;
  uintptr_t address_;  // modulo the alignment
  std::vector<int64_t> shape_, strides_;
};

// Where launches put what they find, and what they need meanwhile.
struct DeviceMemory {
  dlpack::Device device{0, 0};
  void* stream = nullptr;
  bool is_capturing = false;  // the stream, when the memory was made
  char* scratch = nullptr;
  int64_t bytes = 0;
};

// Whether a graph is made of what is launched on a stream. False where the driver does not tell.
bool is_captured(void* stream, bool& out);

// All launches of one use, for tensors of one kind.
class Launches {
 public:
  // `kept` is a Python object that keeps the functions alive; `places` where each output goes in
  // the table, in their order.
  Launches(std::vector<Likeness> inputs, std::vector<Launch> launches, std::vector<int64_t> places,
           int64_t bytes, PyObject* kept);

  const std::vector<int64_t>& places() const { return places_; }
  int64_t bytes() const { return bytes_; }  // of scratch
  size_t size() const { return launches_.size(); }
  size_t inputs() const { return inputs_.size(); }

  // Launches all of them on the stream of the memory. False where a tensor is another, or an
  // address is not aligned as an allocation is: nothing was launched then. Throws
  // std::runtime_error where the driver refuses. Other Python threads go on meanwhile: a launch
  // waits where the queue is full, perhaps for what they launch elsewhere.
  bool run(const dlpack::Tensor* inputs, void* const* outputs, const DeviceMemory& memory) const;

 private:
  bool fits(const dlpack::Tensor* inputs, void* const* outputs, const DeviceMemory& memory) const;

  std::vector<Likeness> inputs_;
  std::vector<Launch> launches_;
  std::vector<int64_t> places_;
  int64_t bytes_;
  Object kept_;
};

}  // namespace host
}  // namespace fastminima
