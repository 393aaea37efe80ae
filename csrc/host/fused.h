// Steps that make the gradient of their parameter beside its samples' norms.
#pragma once

#include <memory>
#include <string>

#include "host/steps.h"

namespace fastminima {
namespace host {

// What is known of a dense layer of several rows a sample whose weight gradient is made.
struct FusedDense {
  bool out_first;  // the weight is [d_out, d_in], else [d_in, d_out]
  int64_t rows, columns;
  int64_t rows_at_a_time;  // of the gradient; 0: all
};
// Its gradients are the weight's and, unless the pass makes that one, the bias'.
std::unique_ptr<Step> fused_sequences(int64_t node, const std::string& saved, Places places,
                                      Layout layout, const FusedDense& known,
                                      const std::string& dtype, const std::string& isa);

}  // namespace host
}  // namespace fastminima
