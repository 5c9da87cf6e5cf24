// Calls of kernels with a node of the autograd graph, made in C++.
#pragma once

#include <Python.h>

namespace pydl {

// differentiable(name, tensors, outputs, shown, forward, saves, backward) -> call(backend, *args);
// pydl/autograd.py says what each is.
PyObject* differentiable(PyObject* module, PyObject* arguments);

}  // namespace pydl
