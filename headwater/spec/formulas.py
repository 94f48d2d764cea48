# ruff: noqa: ANN001, ANN201, ANN202
# mypy: allow-untyped-defs, allow-untyped-calls
"""The arithmetic of the rules: what becomes of one float32 element, each formula once.

Invariants:
- Every function is `(value, gradient, *states, *scalars) -> value` or `(value, *states)`.
- Only + − × ÷, `math.sqrt`, `abs`, comparisons and functions of this module: the same bits on every
  machine and in every loop made from it. They are untyped because they run on floats and NumPy scalars
  alike, and are the source that `headwater.kernels` compiles.
"""

import math


def sgd(value, gradient, lr, weight_decay):
    """value −= lr · (g + weight_decay · value)      (torch.optim.SGD)"""
    return value - lr * (gradient + weight_decay * value)


def sgd_momentum(value, gradient, momentum_buffer, lr, weight_decay, keep, take, direct, through):
    """buffer = keep · buffer + take · g;  value −= lr · (direct · g + through · buffer)

    Polyak 1964 with (keep, take, direct, through) = (momentum, 1 − dampening, 0, 1), Nesterov's as
    Sutskever et al. 2013 have it with (momentum, 1, 1, momentum); in a tensor's first update
    (keep, take) = (0, 1).      (torch.optim.SGD)
    """
    gradient += weight_decay * value
    momentum_buffer = keep * momentum_buffer + take * gradient
    return value - lr * (direct * gradient + through * momentum_buffer), momentum_buffer


def adagrad(value, gradient, squares, lr, eps, weight_decay):
    """g += weight_decay · value;  squares += g²;  value −= lr · g / (√squares + eps)

    Duchi et al. 2011; lr = lr₀ / (1 + (count − 1) · lr_decay)      (torch.optim.Adagrad)
    """
    gradient += weight_decay * value
    squares += gradient * gradient
    return value - lr * gradient / (math.sqrt(squares) + eps), squares


def rowwise_adagrad(value, gradient, squares, lr, eps):
    """value −= lr · g / (√squares + eps), after squares += mean of the row's g²

    One sum a row for Adagrad's one an element (Mudigere et al. 2022, section 4.1.4; TorchRec's
    RowWiseAdagrad).
    """
    return value - lr * gradient / (math.sqrt(squares) + eps)


def rmsprop(value, gradient, square_avg, lr, eps, weight_decay, alpha, rest):
    """square_avg = alpha · square_avg + (1 − alpha) · g²;  value −= lr · g / (√square_avg + eps)

    g += weight_decay · value before; rest = 1 − alpha. Tieleman & Hinton 2012      (torch.optim.RMSprop)
    """
    gradient += weight_decay * value
    square_avg = alpha * square_avg + rest * gradient * gradient
    return value - lr * gradient / (math.sqrt(square_avg) + eps), square_avg


def rmsprop_momentum(value, gradient, square_avg, buffer, lr, eps, weight_decay, alpha, rest, momentum):
    """As `rmsprop`, with buffer = momentum · buffer + g / (√square_avg + eps);  value −= lr · buffer"""
    gradient += weight_decay * value
    square_avg = alpha * square_avg + rest * gradient * gradient
    buffer = momentum * buffer + gradient / (math.sqrt(square_avg) + eps)
    return value - lr * buffer, square_avg, buffer


def rmsprop_centered(value, gradient, square_avg, grad_avg, lr, eps, weight_decay, alpha, rest):
    """As `rmsprop`, with √(square_avg − grad_avg²) for √square_avg (Graves 2013)

    grad_avg = alpha · grad_avg + (1 − alpha) · g.
    """
    gradient += weight_decay * value
    square_avg = alpha * square_avg + rest * gradient * gradient
    grad_avg = alpha * grad_avg + rest * gradient
    return value - lr * gradient / (_deviation(square_avg, grad_avg) + eps), square_avg, grad_avg


def rmsprop_centered_momentum(
    value, gradient, square_avg, buffer, grad_avg, lr, eps, weight_decay, alpha, rest, momentum
):
    """`rmsprop_centered` with the buffer of `rmsprop_momentum`."""
    gradient += weight_decay * value
    square_avg = alpha * square_avg + rest * gradient * gradient
    grad_avg = alpha * grad_avg + rest * gradient
    buffer = momentum * buffer + gradient / (_deviation(square_avg, grad_avg) + eps)
    return value - lr * buffer, square_avg, buffer, grad_avg


def _deviation(square_avg, grad_avg):
    """√(square_avg − grad_avg²), and 0 where rounding makes that negative (torch then has NaN)."""
    variance = square_avg - grad_avg * grad_avg
    return math.sqrt(0.0 if variance < 0.0 else variance)


def adam(value, gradient, exp_avg, exp_avg_sq, step, correction, eps, beta1, rest1, beta2, rest2, l2, shrink):
    """value = shrink · value − step · exp_avg / (√exp_avg_sq · correction + eps)

    g += l2 · value;  exp_avg = beta1 · exp_avg + (1 − beta1) · g;
    exp_avg_sq = beta2 · exp_avg_sq + (1 − beta2) · g²;  rest = 1 − beta;
    step = lr / (1 − beta1^count);  correction = 1 / √(1 − beta2^count).
    Kingma & Ba 2015 with l2 = weight_decay, shrink = 1; Loshchilov & Hutter 2019 (AdamW) with l2 = 0,
    shrink = 1 − lr · weight_decay      (torch.optim.Adam, AdamW)
    """
    gradient += l2 * value
    exp_avg = beta1 * exp_avg + rest1 * gradient
    exp_avg_sq = beta2 * exp_avg_sq + rest2 * gradient * gradient
    value = shrink * value - step * exp_avg / (math.sqrt(exp_avg_sq) * correction + eps)
    return value, exp_avg, exp_avg_sq


def adam_amsgrad(
    value,
    gradient,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    step,
    correction,
    eps,
    beta1,
    rest1,
    beta2,
    rest2,
    l2,
    shrink,
):
    """`adam` with the largest exp_avg_sq so far in the denominator (Reddi et al. 2018)."""
    gradient += l2 * value
    exp_avg = beta1 * exp_avg + rest1 * gradient
    exp_avg_sq = beta2 * exp_avg_sq + rest2 * gradient * gradient
    max_exp_avg_sq = max_exp_avg_sq if max_exp_avg_sq > exp_avg_sq else exp_avg_sq
    value = shrink * value - step * exp_avg / (math.sqrt(max_exp_avg_sq) * correction + eps)
    return value, exp_avg, exp_avg_sq, max_exp_avg_sq


def yogi(value, gradient, exp_avg, exp_avg_sq, lr, eps, beta1, rest1, rest2, l2):
    """value −= lr · exp_avg / (√exp_avg_sq + eps)

    g += l2 · value;  exp_avg = beta1 · exp_avg + (1 − beta1) · g;
    exp_avg_sq −= (1 − beta2) · sign(exp_avg_sq − g²) · g²;  rest = 1 − beta.
    Zaheer et al. 2018, algorithm 2, which corrects no bias; FedYogi (Reddi et al. 2021) on changes of
    parameters.
    """
    gradient += l2 * value
    square = gradient * gradient
    exp_avg = beta1 * exp_avg + rest1 * gradient
    if exp_avg_sq > square:
        exp_avg_sq -= rest2 * square
    elif exp_avg_sq < square:
        exp_avg_sq += rest2 * square
    return value - lr * exp_avg / (math.sqrt(exp_avg_sq) + eps), exp_avg, exp_avg_sq


def lamb(
    value,
    gradient,
    exp_avg,
    exp_avg_sq,
    rate,
    keep,
    correction1,
    correction2,
    eps,
    beta1,
    rest1,
    beta2,
    rest2,
    decay,
):
    """value = keep · value − rate · (correction1 · exp_avg / (√exp_avg_sq · correction2 + eps) + decay ·
    value)

    exp_avg = beta1 · exp_avg + (1 − beta1) · g;  exp_avg_sq = beta2 · exp_avg_sq + (1 − beta2) · g²;
    rest = 1 − beta;  correction1 = 1 / (1 − beta1^count);  correction2 = 1 / √(1 − beta2^count);  keep = 1;
    rate = lr · ‖value‖ / ‖what is in brackets‖ over the tensor. You et al. 2020, algorithm 2, with φ(z) = z.
    """
    exp_avg = beta1 * exp_avg + rest1 * gradient
    exp_avg_sq = beta2 * exp_avg_sq + rest2 * gradient * gradient
    direction = correction1 * exp_avg / (math.sqrt(exp_avg_sq) * correction2 + eps) + decay * value
    return keep * value - rate * direction, exp_avg, exp_avg_sq


def lion(value, gradient, exp_avg, lr, shrink, beta1, rest1, beta2, rest2):
    """value = shrink · value − lr · sign(beta1 · exp_avg + (1 − beta1) · g)

    exp_avg = beta2 · exp_avg + (1 − beta2) · g afterwards;  shrink = 1 − lr · weight_decay;  rest = 1 − beta.
    Chen et al. 2023, algorithm 2.
    """
    direction = beta1 * exp_avg + rest1 * gradient
    value = shrink * value
    if direction > 0.0:
        value -= lr
    elif direction < 0.0:
        value += lr
    return value, beta2 * exp_avg + rest2 * gradient


def ftrl(value, gradient, accum, linear, inverse_lr, l1, ridge):
    """value = 0 where |linear| ≤ l1, else (sign(linear) · l1 − linear) / (√accum / lr + ridge)

    accum += g²;  linear += g − (√accum − √accum_before) / lr · value;  ridge = beta / lr + 2 · l2.
    McMahan et al. 2013 with the power −½      (TensorFlow: tf.keras.optimizers.Ftrl)
    """
    root_before = math.sqrt(accum)
    accum += gradient * gradient
    root = math.sqrt(accum)
    linear += gradient - (root - root_before) * inverse_lr * value
    beyond = (l1 if linear > 0.0 else -l1) - linear
    return 0.0 if abs(linear) <= l1 else beyond / (root * inverse_lr + ridge), accum, linear


def accumulate(value, gradient):
    """value += g"""
    return value + gradient


def assign(value, gradient):
    """value = g"""
    return gradient
