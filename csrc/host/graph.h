// Graphs of autograd whose structure is known: walked again, and compared, in every step.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

#include "host/tensors.h"

namespace fastminima {
namespace host {

// The nodes and edges below a root, in the order of the walk of `capture/graph/tape.py`.
class Wiring {
 public:
  // Of each node: its name and its Python type; for each of its inputs the pair (node, output
  // number) or None; and the name of the tracked parameter that it is a leaf of, or None.
  Wiring(PyObject* names, PyObject* types, PyObject* children, PyObject* leaves);
  ~Wiring();
  Wiring(const Wiring&) = delete;
  Wiring& operator=(const Wiring&) = delete;

  // The nodes below a root, a list; None where the graph is another one. `parameters` are the
  // names of the tracked parameters by id. Null with a Python error set.
  PyObject* follow(PyObject* root, PyObject* parameters) const;

 private:
  struct Edge {
    int64_t node;  // -1: none
    int64_t output;
  };
  struct Node {
    PyObject* name;
    PyTypeObject* type;
    bool is_named_by_type;  // no other kind of node has this type
    bool is_leaf;
    PyObject* parameter;  // None: none that is tracked
    size_t first, last;   // of its edges
  };

  bool is_same(PyObject* node, const Node& known, PyObject* parameters, int& failed) const;

  std::vector<Node> nodes_;
  std::vector<Edge> edges_;
};

// What must hold of some nodes: an attribute's value, or the shapes of the outputs.
class Conditions {
 public:
  Conditions() = default;
  ~Conditions();
  Conditions(const Conditions&) = delete;
  Conditions& operator=(const Conditions&) = delete;

  // An attribute of node `node` equals a value.
  void add_value(int64_t node, PyObject* attribute, PyObject* value);
  // The shapes of the outputs of node `node` are a sequence of tuples.
  void add_shapes(int64_t node, PyObject* shapes);
  // Node `node` accumulates the gradient of a leaf of this shape, and of the dtype that this one
  // has if `read` knows it.
  void add_leaf(int64_t node, PyObject* shape, PyObject* leaf);
  // Node `node` accumulates the gradient of a leaf of exactly this type.
  void add_type(int64_t node, PyObject* type);
  // 1: all of them hold; 0: not; -1 with a Python error set.
  int hold(PyObject* nodes) const;

 private:
  enum Kind : char { kValue, kShapes, kLeaf, kType };
  struct Condition {
    Kind kind;
    int64_t node;
    PyObject* attribute;  // of kValue
    PyObject* value;
    dlpack::Dtype dtype{};  // of kLeaf
  };
  // As `hold`, of one of them.
  static int holds(const Condition& condition, PyObject* node);

  std::vector<Condition> conditions_;
};

}  // namespace host
}  // namespace fastminima
