#include "host/called.h"

namespace fastminima {
namespace host {

Called::Called(int64_t node, const std::vector<std::string>& saved, bool minds_sign)
    : Step(node, saved), minds_sign_(minds_sign) {}

bool Called::compute(const dlpack::Tensor* x, const Workspace& workspace) const {
  const DeviceMemory& memory = workspace.device;
  void* stream;
  if (!workspace.has_device || !current_stream(memory.device, stream) || stream != memory.stream)
    return false;
  // A graph keeps the memory that was made in it, and no other.
  bool is_capturing;
  if (!is_captured(stream, is_capturing) || is_capturing != memory.is_capturing) return false;
  for (size_t k = 0; k < known_.size(); k++) {
    auto launches = known_[k];  // held: other threads run meanwhile, which may add some
    void* outputs[kMost];
    for (size_t i = 0; i < launches->places().size(); i++) {
      int64_t place = launches->places()[i];
      outputs[i] = place < 0 ? workspace.gradients[-1 - place] : workspace.row<float>(place);
    }
    if (launches->run(x, outputs, memory)) return true;
  }
  return false;
}

}  // namespace host
}  // namespace fastminima
