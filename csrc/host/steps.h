// What is done with the output gradient of one use, once and for all decided.
#pragma once

#include <Python.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "host/attribute.h"
#include "host/launches.h"
#include "host/tensors.h"

namespace fastminima {
namespace host {

// Rows of a dimension that run over (outer, batch, inner); the middle is the sample.
struct Layout {
  int dim;
  int64_t outer, batch, inner;
};

// Where squared norms go: rows of a table [parameters, batch]. -1: nobody asks.
struct Places {
  int64_t weight, bias;
};

// What a step may use besides its tensors.
struct Workspace {
  void* table = nullptr;          // [parameters, batch], in the step's dtype
  int64_t batch = 0, stride = 0;  // from row to row
  int threads = 1;
  std::vector<char>* memory = nullptr;  // grows as needed
  bool has_device = false;
  DeviceMemory device;                      // of launches, where there are some
  void* gradients[2] = {nullptr, nullptr};  // memory of what the step makes

  template <typename scalar_t>
  scalar_t* row(int64_t place) const {
    return place < 0 ? nullptr : static_cast<scalar_t*>(table) + place * stride;
  }
  template <typename scalar_t>
  scalar_t* gradient(size_t number) const {
    return static_cast<scalar_t*>(gradients[number]);
  }
  template <typename scalar_t>
  scalar_t* scratch(int64_t count) const {
    size_t bytes = count * sizeof(scalar_t) + 64;
    if (memory->size() < bytes) memory->resize(bytes);
    return reinterpret_cast<scalar_t*>((reinterpret_cast<uintptr_t>(memory->data()) + 63) / 64 *
                                       64);
  }
};

// Made for the node of this number in its graph; reads what autograd saved by these names.
class Step {
 public:
  // `source`: the node that has saved it, where that is another one; else -1.
  Step(int64_t node, const std::vector<std::string>& saved, int64_t source = -1);
  virtual ~Step();
  Step(const Step&) = delete;
  Step& operator=(const Step&) = delete;

  int64_t node() const { return node_; }
  int64_t source() const { return source_; }

  // Attributes of the node that must have a value in every graph, such as a factor of 1.
  void require(PyObject* attribute, PyObject* value) { require_of(node_, attribute, value); }
  // The same of another node.
  void require_of(int64_t node, PyObject* attribute, PyObject* value);
  // 1: the nodes of this graph are what the step was made for; 0: not; -1 with a Python error set.
  int fits(PyObject* nodes) const;

  static constexpr size_t kMost = 4;  // tensors, with the gradient

  // The gradient of a parameter, which the step makes beside the norms.
  struct Gradient {
    int64_t row;            // of the parameter
    PyObject* shape;        // a tuple
    PyObject *made, *kept;  // dtypes: what the step writes, None for that of its tensors, and what
                            // the parameter has, None where that is the same
  };
  static constexpr size_t kMostGradients = 2;
  void make(int64_t row, PyObject* shape, PyObject* made, PyObject* kept);
  const std::vector<Gradient>& gradients() const { return gradients_; }

  // Reads what the node has saved. 1: done; 0: something that may not be read here; -1 with a
  // Python error set.
  int read_saved(PyObject* node, Object* saved) const;
  size_t saved() const { return saved_.size(); }

  // Whether Python takes what is not computed, and whether all is its affair.
  virtual bool is_called() const { return false; }
  virtual bool is_by_rule() const { return false; }
  // Whether there is something to compute with.
  virtual bool is_computed() const { return true; }
  // The step by which the parameter is used too, where both are computed together: as soon as the
  // second has come, from the tensors of both, those of the earlier step in the program first.
  virtual int64_t partner() const { return -1; }
  // Whether the sign of what is read first counts, the gradient aside. No norm changes with the
  // sign of a whole tensor, so a product does not mind a view whose negation is not done in memory;
  // a step that makes gradients minds all signs.
  virtual bool minds_sign() const { return false; }
  // The gradient, then what was saved. False where they are not what the step was made for.
  virtual bool compute(const dlpack::Tensor* x, const Workspace& workspace) const = 0;

 private:
  struct Required {
    int64_t node;
    Attribute attribute;
    PyObject* value;
  };
  int64_t node_, source_;
  Attribute raw_;  // the first of them, not unpacked
  std::vector<Attribute> saved_;
  std::vector<Required> required_;
  std::vector<Gradient> gradients_;
};

using Steps = std::vector<std::unique_ptr<Step>>;

// A dense layer of which each sample has one row: inputs named `saved`.
std::unique_ptr<Step> single_rows(int64_t node, const std::string& saved, Places places,
                                  const std::string& dtype, const std::string& isa);
// One of several rows a sample: by the Gram sum with this guard, or directly where it is negative.
std::unique_ptr<Step> sequences(int64_t node, const std::string& saved, Places places,
                                Layout layout, double guard, const std::string& dtype,
                                const std::string& isa);
// A layer norm's scale and shift.
std::unique_ptr<Step> layer_norm(int64_t node, const std::vector<std::string>& saved, Places places,
                                 Layout layout, int trailing, const std::string& dtype,
                                 const std::string& isa);
// A scale of the last dim.
std::unique_ptr<Step> scale(int64_t node, const std::string& saved, Places places, Layout layout,
                            const std::string& dtype, const std::string& isa);
// A term that is added to all rows, along the last dim.
std::unique_ptr<Step> sum(int64_t node, Places places, Layout layout, const std::string& dtype,
                          const std::string& isa);
// A table whose rows are looked up.
std::unique_ptr<Step> table(int64_t node, const std::string& saved, Places places, Layout layout,
                            int64_t padding, const std::string& dtype, const std::string& isa);

// A table looked up once for all samples, then added to something that has them.
std::unique_ptr<Step> shared_table(int64_t node, int64_t source, const std::string& saved,
                                   Places places, Layout layout, int64_t padding,
                                   const std::string& dtype, const std::string& isa);

// What is known of a table that is a head too.
struct Tied {
  bool is_head_first;  // in the order of the program
  Layout head;
  double guard;
  Layout table;
  int64_t padding;
  int64_t rows_at_a_time;  // of the gradient, where the step makes it; 0: all
};
// The first of two steps that are computed together: `partner` does that.
std::unique_ptr<Step> half(int64_t node, const std::string& saved, int64_t partner);
// The second.
std::unique_ptr<Step> tied(int64_t node, const std::string& saved, int64_t partner, Places places,
                           const Tied& known, const std::string& dtype, const std::string& isa);

}  // namespace host
}  // namespace fastminima
