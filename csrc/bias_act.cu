// CUDA: y = dropout(act(x + bias)), bias along the channels of (outer, channels, inner).
#include "activation_functors.h"
#include "channels.cuh"

namespace pydl {
inline namespace PYDL_ISA {
namespace {

// The bias comes expanded to the shape of x; with dropout x is contiguous.
void bias_act_fwd(Stream stream, Out y, View x, View bias, Maybe seed, int64_t act,
                  double parameter, double dropout_p) {
  const Dropout dropout = dropout_of("bias_act", seed, dropout_p);
  check_activation("bias_act", act);
  with_activation(act, parameter, [&](auto f) {
    // The bias is broadcast: 16 bytes at a time is the way of the strided kernel.
    map<kPackedFast, 1, 2>(stream, "bias_act", BiasForward<decltype(f)>{f, dropout},
                           BiasForward<AnyActivation>{any_of(f), dropout}, {y}, {x, bias});
  });
}

void bias_act_bwd(Stream stream, Out dx, Out dbias, Out partials, View dy, View x, View bias,
                  Maybe seed, int64_t act, double parameter, double dropout_p) {
  const Dropout dropout = dropout_of("bias_act", seed, dropout_p);
  check_activation("bias_act", act);
  with_activation(act, parameter, [&](auto f) {
    map_and_sum<1, 2>(stream, "bias_act", BiasBackward<decltype(f)>{f, dropout},
                      BiasBackward<AnyActivation>{any_of(f), dropout}, {dx}, {dy, x}, bias, dbias,
                      partials);
  });
}

}  // namespace
}  // namespace PYDL_ISA
}  // namespace pydl

using namespace pydl;
EXPORT(cuda, bias_act_fwd, "y, x, bias, seed, act, parameter, dropout_p", bias_act_fwd)
EXPORT(cuda, bias_act_bwd, "dx, dbias, partials, dy, x, bias, seed, act, parameter, dropout_p",
       bias_act_bwd)
