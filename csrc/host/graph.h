// Graphs of autograd whose structure is known: walked again, and compared, in every step.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

#include "host/attribute.h"
#include "host/names.h"
#include "host/tensors.h"

namespace fastminima {
namespace host {

// The nodes of a graph, and what its leaves accumulate the gradients of.
struct Found {
  Object nodes;                   // a list
  std::vector<Object> variables;  // none for other nodes
};

// The nodes and edges below a root, in the order of the walk of `capture/graph/tape.py`.
class Wiring {
 public:
  // Of each node: its name and its Python type; for each of its inputs the pair (node, output
  // number) or None; and the name of the tracked parameter that it is a leaf of, or None.
  Wiring(PyObject* names, PyObject* types, PyObject* children, PyObject* leaves);
  ~Wiring();
  Wiring(const Wiring&) = delete;
  Wiring& operator=(const Wiring&) = delete;

  // The nodes below a root; none where the graph is another one. `parameters` are the names of the
  // tracked parameters by id. -1 with a Python error set, else whether it is this graph.
  int follow(PyObject* root, PyObject* parameters, Found& found) const;

 private:
  // What nodes of one name and type have in common.
  struct Kind {
    PyObject* name;
    PyTypeObject* type;
    bool is_named_by_type;  // no other kind of node has this type
    Attribute next_functions;
  };
  struct Edge {
    int64_t node;  // -1: none
    int64_t output;
  };
  struct Node {
    size_t kind;
    bool is_leaf;
    PyObject* parameter;  // None: none that is tracked
    size_t first, last;   // of its edges
  };

  size_t kind_of(PyObject* name, PyTypeObject* type);
  // Whether a node is of a kind.
  static int is_of(PyObject* node, const Kind& kind);
  // Whether a leaf is that of a parameter, or of none that is tracked.
  static int is_of_parameter(PyObject* variable, PyObject* parameter, PyObject* parameters);

  std::vector<Kind> kinds_;
  std::vector<Node> nodes_;
  std::vector<Edge> edges_;
  Attribute variable_{names().variable};
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
  // 1: all of them hold; 0: not; -1 with a Python error set. `variables` may be none.
  int hold(PyObject* nodes, const std::vector<Object>& variables) const;

 private:
  enum Kind : char { kValue, kShapes, kLeaf, kType };
  struct Condition {
    Kind kind;
    int64_t node;
    PyObject* value;
    Attribute attribute;
    dlpack::Dtype dtype{};  // of kLeaf
  };
  // As `hold`, of one of them.
  static int holds(const Condition& condition, PyObject* node, PyObject* variable);

  std::vector<Condition> conditions_;
};

}  // namespace host
}  // namespace fastminima
