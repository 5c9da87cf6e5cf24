// CPU: y = dropout(act(x + bias)), bias along the channels of (outer, channels, inner).
#include "activation_functors.h"
#include "channels.h"

namespace pydl {
inline namespace PYDL_ISA {
namespace {

// The bias comes expanded to the shape of x; with dropout x is contiguous.
void bias_act_fwd(Out y, View x, View bias, Maybe seed, int64_t act, double parameter,
                  double dropout_p) {
  const Dropout dropout = dropout_of("bias_act", seed, dropout_p);
  check_activation("bias_act", act);
  with_activation(act, parameter, [&](auto f) {
    map<BiasForward<decltype(f)>, 1, 2>("bias_act", {f, dropout}, {y}, {x, bias});
  });
}

void bias_act_bwd(Out dx, Out dbias, Out partials, View dy, View x, View bias, Maybe seed,
                  int64_t act, double parameter, double dropout_p) {
  const Dropout dropout = dropout_of("bias_act", seed, dropout_p);
  check_activation("bias_act", act);
  with_activation(act, parameter, [&](auto f) {
    map_and_sum<BiasBackward<decltype(f)>, 1, 2>("bias_act", {f, dropout}, {dx}, {dy, x}, bias,
                                                 dbias, partials);
  });
}

}  // namespace
}  // namespace PYDL_ISA
}  // namespace pydl

using namespace pydl;
EXPORT(cpu, bias_act_fwd, "y, x, bias, seed, act, parameter, dropout_p", bias_act_fwd)
EXPORT(cpu, bias_act_bwd, "dx, dbias, partials, dy, x, bias, seed, act, parameter, dropout_p",
       bias_act_bwd)
