// The functions that batch_norm.cpp and batch_norm.cu offer alike, as BACKEND says.
#define BATCH_NORM_OF(backend, name, names) EXPORT(backend, name, names, name)
#define BATCH_NORM(name, names) BATCH_NORM_OF(BACKEND, name, names)
BATCH_NORM(batch_norm_fwd,
           "y, mean, rest, var, scratch, x, residual, weight, bias, eps, groups, act, parameter, "
           "pieces")
BATCH_NORM(batch_norm_moments, "mean, rest, var, scratch, x, groups, pieces")
BATCH_NORM(batch_norm_apply,
           "y, x, residual, mean, rest, var, weight, bias, eps, groups, act, parameter")
BATCH_NORM(batch_norm_bwd,
           "dx, dz, dweight, dbias, scratch, dy, x, residual, mean, rest, var, weight, bias, eps, "
           "groups, act, parameter, pieces, training")
BATCH_NORM(batch_norm_sums,
           "sums, dz, scratch, dy, x, residual, mean, rest, var, weight, bias, eps, groups, act, "
           "parameter, pieces")
BATCH_NORM(batch_norm_dx,
           "dx, scratch, dy, x, residual, mean, rest, var, sums, weight, bias, eps, groups, act, "
           "parameter, count")
