"""Messages: what each atom receives from its neighbours, and the transpose of that sum by hand.

S, V and x are atom features, W filters of the pairs, u directions. Sums over Cartesian axes carry the index c.
The transpose of a sum over received pairs is a sum over sent pairs; over a symmetric list, with filters that depend
on the distance alone, it is the same gather-sum once more (Pairs.transpose_sum).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxff.system import Pairs

# --- student: the filter is the whole weight -----------------------------------------------------------------------


def message_reference(
    s: Float[Array, "N F"],
    v: Float[Array, "N 3 F"],
    filters: Float[Array, "E 3F"],
    directions: Float[Array, "E 3"],
    pairs: Pairs,
) -> tuple[Float[Array, "N F"], Float[Array, "N 3 F"]]:
    """The plain primal of `message`."""
    ws, w1, w2 = _split(filters, pairs)
    ds = pairs.sum_at_receivers(pairs.at_senders(s) * ws)
    dv = pairs.sum_at_receivers(pairs.at_senders(v) * w1[:, None, :] + directions[:, :, None] * w2[:, None, :])
    return ds, dv


@jax.custom_vjp
def message(
    s: Float[Array, "N F"],
    v: Float[Array, "N 3 F"],
    filters: Float[Array, "E 3F"],
    directions: Float[Array, "E 3"],
    pairs: Pairs,
) -> tuple[Float[Array, "N F"], Float[Array, "N 3 F"]]:
    """The student's message: Δs_i = Σ_j s_j Ws_ij,  Δv_i = Σ_j (v_j W1_ij + u_ij ⊗ W2_ij).

    s: [N, F]; v: [N, 3, F]; filters [Ws, W1, W2]: [E, 3F]; directions u: [E, 3]. Returns Δs [N, F], Δv [N, 3, F].
    """
    return message_reference(s, v, filters, directions, pairs)


def message_fwd(
    s: Array, v: Array, filters: Array, directions: Array, pairs: Pairs
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array, Array, Pairs]]:
    """message with what its backward needs: its arguments."""
    return message_reference(s, v, filters, directions, pairs), (s, v, filters, directions, pairs)


def message_bwd(
    residuals: tuple[Array, Array, Array, Array, Pairs], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, Array, Array, None]:
    """With p = Δs̄_i, q = Δv̄_i at the receivers:

    s̄_j = Σ_i Ws p,  v̄_j = Σ_i W1 q,  W̄s = s_j p,  W̄1 = Σ_c v_jc q_c,  W̄2 = Σ_c u_c q_c,  ū_c = Σ_f W2 q_c.
    """
    s, v, filters, directions, pairs = residuals
    ds_bar, dv_bar = cotangents
    ws, w1, w2 = _split(filters, pairs)
    p, q = pairs.at_receivers(ds_bar), pairs.at_receivers(dv_bar)
    filters_bar = jnp.concatenate(
        [
            pairs.at_senders(s) * p,
            jnp.sum(pairs.at_senders(v) * q, axis=1),
            jnp.sum(directions[:, :, None] * q, axis=1),
        ],
        axis=1,
    )
    return (
        pairs.transpose_sum(ws, ds_bar),
        pairs.transpose_sum(w1[:, None, :], dv_bar),
        jnp.where(pairs.mask[:, None], filters_bar, 0),
        jnp.sum(w2[:, None, :] * q, axis=2),
        None,
    )


message.defvjp(message_fwd, message_bwd)


# --- PaiNN: the filter gates a network of s_j ----------------------------------------------------------------------


def gated_message_reference(
    x: Float[Array, "N 3F"],
    v: Float[Array, "N 3 F"],
    filters: Float[Array, "E 3F"],
    directions: Float[Array, "E 3"],
    pairs: Pairs,
) -> tuple[Float[Array, "N F"], Float[Array, "N 3 F"]]:
    """The plain primal of `gated_message`."""
    ws, wu, wv = _split(filters, pairs)
    xs, xu, xv = jnp.split(pairs.at_senders(x), 3, axis=1)
    ds = pairs.sum_at_receivers(xs * ws)
    dv = pairs.sum_at_receivers(
        directions[:, :, None] * (xu * wu)[:, None, :] + pairs.at_senders(v) * (xv * wv)[:, None, :]
    )
    return ds, dv


@jax.custom_vjp
def gated_message(
    x: Float[Array, "N 3F"],
    v: Float[Array, "N 3 F"],
    filters: Float[Array, "E 3F"],
    directions: Float[Array, "E 3"],
    pairs: Pairs,
) -> tuple[Float[Array, "N F"], Float[Array, "N 3 F"]]:
    """PaiNN's message (arXiv:2102.03150, eqs. 7, 8).

    Δs_i = Σ_j xs_j Ws_ij,  Δv_i = Σ_j (u_ij xu_j Wu_ij + v_j xv_j Wv_ij).

    x = [xs, xu, xv]: [N, 3F], the gates φ(s); v: [N, 3, F]; filters [Ws, Wu, Wv]: [E, 3F]; directions u: [E, 3].
    """
    return gated_message_reference(x, v, filters, directions, pairs)


def gated_message_fwd(
    x: Array, v: Array, filters: Array, directions: Array, pairs: Pairs
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array, Array, Pairs]]:
    """gated_message with what its backward needs: its arguments."""
    return gated_message_reference(x, v, filters, directions, pairs), (x, v, filters, directions, pairs)


def gated_message_bwd(
    residuals: tuple[Array, Array, Array, Array, Pairs], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, Array, Array, None]:
    """With p = Δs̄_i and q = Δv̄_i at the receivers, a = p, b = Σ_c u_c q_c, g = Σ_c v_jc q_c at the pairs:

    W̄ = x_j [a, b, g],  x̄_j = Σ_i W [a, b, g],  v̄_j = xv_j Σ_i Wv q,  ū_c = Σ_f xu_j Wu q_c.

    Over a symmetric list the sums over i run at the receivers, with u of the reverse pair, -u.
    """
    x, v, filters, directions, pairs = residuals
    ds_bar, dv_bar = cotangents
    ws, wu, wv = _split(filters, pairs)
    x_j, v_j = pairs.at_senders(x), pairs.at_senders(v)
    xu_j = jnp.split(x_j, 3, axis=1)[1]
    q = pairs.at_receivers(dv_bar)
    along_u = jnp.sum(directions[:, :, None] * q, axis=1)
    filters_bar = x_j * jnp.concatenate([pairs.at_receivers(ds_bar), along_u, jnp.sum(v_j * q, axis=1)], axis=1)
    sent_v = pairs.transpose_sum(wv[:, None, :], dv_bar)
    if pairs.transposes_by_gather:
        q_j = pairs.at_senders(dv_bar)
        sent_u = -pairs.sum_at_receivers(wu * jnp.sum(directions[:, :, None] * q_j, axis=1))
    else:
        sent_u = pairs.sum_at_senders(wu * along_u)
    x_bar = jnp.concatenate([pairs.transpose_sum(ws, ds_bar), sent_u, jnp.sum(v * sent_v, axis=1)], axis=1)
    xv = jnp.split(x, 3, axis=1)[2]
    return (
        x_bar,
        xv[:, None, :] * sent_v,
        jnp.where(pairs.mask[:, None], filters_bar, 0),
        jnp.sum((xu_j * wu)[:, None, :] * q, axis=2),
        None,
    )


gated_message.defvjp(gated_message_fwd, gated_message_bwd)


def _split(filters: Float[Array, "E 3F"], pairs: Pairs) -> list[Float[Array, "E F"]]:
    """The three filters, zero on masked pairs."""
    return jnp.split(jnp.where(pairs.mask[:, None], filters, 0), 3, axis=1)
