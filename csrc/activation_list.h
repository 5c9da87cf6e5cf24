// The elementwise activations, one line each: UNARY(name, functor, ", parameter names", parameter
// types). activation.cpp and activation.cu include this with UNARY defined.
UNARY(sigmoid, Sigmoid, "")
UNARY(tanh, Tanh, "")
UNARY(relu, Relu, "")
UNARY(leaky_relu, LeakyRelu, ", negative_slope", double)
UNARY(elu, Elu, ", alpha", double)
UNARY(selu, Selu, "")
UNARY(gelu, Gelu, "")
UNARY(gelu_tanh, GeluTanh, "")
UNARY(silu, Silu, "")
UNARY(swish, Swish, ", beta", double)
UNARY(mish, Mish, "")
#undef UNARY
