// The gradients of one pass, read when they are about to be accumulated.
#pragma once

#include <Python.h>

#include <memory>
#include <string>
#include <vector>

#include "host/hooks.h"

namespace fastminima {
namespace host {

// |g|^2 of each gradient that comes to an accumulator, in the order in which they come. What it
// does not know goes to `gradients.leaf(number, grads)`.
class Leaves : public Watcher {
 public:
  // `gradients` is referenced weakly. `squares` is a tensor of one number for each leaf, in whose
  // dtype gradients are read here, and outlives the pass.
  Leaves(PyObject* gradients, PyObject* squares, PyObject* arrival, bool by_task,
         const std::string& isa, int threads);
  ~Leaves() override;
  Leaves(const Leaves&) = delete;
  Leaves& operator=(const Leaves&) = delete;

  bool is_ready() const { return is_ready_; }
  // Hooks leaf after leaf: the nodes of these numbers. False with a Python error set.
  static bool hook(const std::shared_ptr<Leaves>& leaves, PyObject* nodes,
                   const std::vector<int64_t>& numbers);
  // Leave out what comes to a leaf from now on: it is read elsewhere.
  void leave_out(size_t leaf) { states_.at(leaf) = kLeftOut; }
  // -1 with a Python error set.
  int close();
  // The leaves whose gradients were read here, as they came.
  const std::vector<int64_t>& order() const { return order_; }

  PyObject* run(size_t leaf, PyObject* grads) override;

 private:
  enum State : char { kWaits, kTaken, kLeftOut };

  PyObject *gradients_, *squares_;  // a weak reference, and the tensor
  PassFilter filter_;
  bool is_ready_ = false, is_closed_ = false;
  std::string isa_;
  int threads_, bits_ = 0;
  void* out_ = nullptr;
  size_t most_ = 0;
  std::vector<int64_t> order_;
  std::vector<char> states_;
  Hooks hooks_;
};

}  // namespace host
}  // namespace fastminima
