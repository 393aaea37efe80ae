// Steps that Python takes, and the launches that take their place.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "host/launches.h"
#include "host/steps.h"

namespace fastminima {
namespace host {

// One that Python takes: on another device, in half precision, or without a kernel here. Where its
// launches are known for such tensors they are made, and Python is not called.
class Called : public Step {
 public:
  // `minds_sign`: as Step has it, for the launches.
  Called(int64_t node, const std::vector<std::string>& saved, bool minds_sign);
  bool is_called() const override { return true; }
  bool minds_sign() const override { return minds_sign_; }
  bool is_computed() const override { return !known_.empty(); }
  bool compute(const dlpack::Tensor* x, const Workspace& workspace) const override;

  void add(std::shared_ptr<const Launches> launches) { known_.push_back(std::move(launches)); }

 private:
  bool minds_sign_;
  std::vector<std::shared_ptr<const Launches>> known_;  // of tensors of several shapes
};

// One of any kind, which reads what it needs by itself.
class ByRule : public Step {
 public:
  explicit ByRule(int64_t node) : Step(node, {}) {}
  bool is_called() const override { return true; }
  bool is_by_rule() const override { return true; }
  bool is_computed() const override { return false; }
  bool compute(const dlpack::Tensor*, const Workspace&) const override { return false; }
};

}  // namespace host
}  // namespace fastminima
