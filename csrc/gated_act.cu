// CUDA: y = act(gate) up, the gated linear units (Shazeer 2020, arXiv 2002.05202).
#include "activation_functors.h"
#include "elementwise.cuh"

namespace pydl {
inline namespace PYDL_ISA {
namespace {

void gated_act_fwd(Stream stream, Out y, View gate, View up, int64_t act, double parameter) {
  check_activation("gated_act", act);
  with_activation(act, parameter, [&](auto f) {
    map<kBothFast, 1, 2>(stream, "gated_act", GatedForward<decltype(f)>{f},
                         GatedForward<AnyActivation>{any_of(f)}, {y}, {gate, up});
  });
}

void gated_act_bwd(Stream stream, Out dgate, Out dup, View dy, View gate, View up, int64_t act,
                   double parameter) {
  check_activation("gated_act", act);
  with_activation(act, parameter, [&](auto f) {
    map<kBothFast, 2, 3>(stream, "gated_act", GatedBackward<decltype(f)>{f},
                         GatedBackward<AnyActivation>{any_of(f)}, {dgate, dup}, {dy, gate, up});
  });
}

}  // namespace
}  // namespace PYDL_ISA
}  // namespace pydl

using namespace pydl;
EXPORT(cuda, gated_act_fwd, "y, gate, up, act, parameter", gated_act_fwd)
EXPORT(cuda, gated_act_bwd, "dgate, dup, dy, gate, up, act, parameter", gated_act_bwd)
