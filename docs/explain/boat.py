"""Draw boat.jpg, the picture of the examples: a sailing boat on the sea, traced ray by ray from formulas.

It is our own work and may be used like the rest of the repository. ``python docs/explain/boat.py`` writes it anew.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

Array = np.ndarray
SIDE, SAMPLES = 448, 3
EYE = np.array([0.0, 1.5, -9.0])
SUN = np.array([-0.62, 0.36, 0.70]) / np.linalg.norm([-0.62, 0.36, 0.70])
MAST = 0.25


def smooth_noise(x: Array, y: Array, seed: int) -> Array:
    """Values from 0 to 1 at whole coordinates, drawn by hash, with smooth steps between them."""
    x0, y0 = np.floor(x), np.floor(y)

    def corner(i: Array, j: Array) -> Array:
        value = np.sin(i * 127.1 + j * 311.7 + seed * 74.7) * 43758.5453
        return value - np.floor(value)

    u, v = x - x0, y - y0
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    low = corner(x0, y0) * (1 - u) + corner(x0 + 1, y0) * u
    high = corner(x0, y0 + 1) * (1 - u) + corner(x0 + 1, y0 + 1) * u
    return low * (1 - v) + high * v


def octaves(x: Array, y: Array, count: int, seed: int) -> Array:
    """Noise of several scales."""
    return sum(smooth_noise(x * 2**k, y * 2**k, seed + k) / 2 ** (k + 1) for k in range(count))


def sky(ray: Array) -> Array:
    """The colour of the sky in a direction: a gradient, clouds, the sun and the glow around it."""
    up = np.clip(ray[..., 1], 0, 1)[..., None]
    low, high = np.array([0.98, 0.80, 0.62]), np.array([0.20, 0.44, 0.78])
    colour = low + (high - low) * np.clip(up * 2.3, 0, 1) ** 0.55
    height = np.clip(ray[..., 1], 0.03, 1)
    cloud = octaves(ray[..., 0] / height * 0.55 + 3.1, ray[..., 2] / height * 0.55, 5, 5)
    cover = np.clip((cloud - 0.52) * 4.5, 0, 1) * np.clip((ray[..., 1] - 0.03) * 9, 0, 1)
    lit = np.array([1.0, 0.95, 0.90]) * (0.82 + 0.30 * np.clip(0.75 - cloud, 0, 1))[..., None]
    colour = colour + (lit - colour) * cover[..., None] * 0.85
    facing = np.clip(ray @ SUN, 0, 1)[..., None]
    return colour + np.array([1.0, 0.78, 0.45]) * (0.55 * facing**24 + 0.9 * facing**900)


def triangle(start: Array, ray: Array, corners: Array) -> tuple[Array, Array]:
    """(distance along each ray, infinite where it misses; place between foot and head of the triangle)."""
    a, b, c = corners
    ab, ac = b - a, c - a
    p = np.cross(ray, ac)
    scale = p @ ab
    scale = np.where(np.abs(scale) < 1e-9, 1e-9, scale)
    s = start - a
    u = (s * p).sum(-1) / scale
    q = np.cross(s, ab)
    v = (ray * q).sum(-1) / scale
    t = (q @ ac) / scale
    return np.where((u >= 0) & (v >= 0) & (u + v <= 1) & (t > 1e-4), t, np.inf), v


def ellipsoid(start: Array, ray: Array, centre: Array, radii: Array) -> Array:
    """Distances to the half of an ellipsoid below y = 0.55: the hull."""
    s, d = (start - centre) / radii, ray / radii
    a, b, c = (d * d).sum(-1), (s * d).sum(-1), (s * s).sum(-1) - 1
    root = np.sqrt(np.clip(b * b - a * c, 0, None))
    hit = np.inf
    for t in ((-b + root) / a, (-b - root) / a):
        below = (start + t[..., None] * ray)[..., 1] < 0.55
        hit = np.where((b * b > a * c) & (t > 1e-4) & below, t, hit)
    return hit


def boat(start: Array, ray: Array) -> tuple[Array, Array]:
    """(distance to the boat, its colour there)."""
    distance = np.full(ray.shape[:-1], np.inf)
    colour = np.zeros(ray.shape)

    def lay(t: Array, tint: Array) -> None:
        nonlocal distance, colour
        nearer = t < distance
        colour = np.where(nearer[..., None], tint, colour)
        distance = np.where(nearer, t, distance)

    hull = ellipsoid(start, ray, np.array([0.1, 0.62, 0]), np.array([2.15, 0.72, 0.85]))
    at = start + np.where(np.isfinite(hull), hull, 0)[..., None] * ray
    stripe = (at[..., 1] > 0.40)[..., None]
    normal = (at - np.array([0.1, 0.62, 0])) / np.array([2.15, 0.72, 0.85]) ** 2
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True) + 1e-9
    light = (0.42 + 0.65 * np.clip(normal @ SUN, 0, 1))[..., None]
    lay(hull, np.where(stripe, np.array([0.93, 0.90, 0.84]), np.array([0.66, 0.13, 0.12])) * light)
    for corners, tint in (
        ([[MAST, 0.85, 0], [-1.75, 0.95, -0.25], [MAST, 4.3, 0]], [0.97, 0.94, 0.88]),
        ([[MAST + 0.1, 0.8, 0], [2.1, 0.7, 0.1], [MAST + 0.1, 3.7, 0]], [0.90, 0.60, 0.30]),
    ):
        t, share = triangle(start, ray, np.array(corners))
        seam = 1 - 0.10 * (np.mod(share * 7, 1) < 0.06)
        lay(t, np.array(tint) * (seam * (0.80 + 0.22 * share))[..., None])
    for low, high in ((MAST - 0.035, MAST + 0.035),):
        t, _ = triangle(start, ray, np.array([[low, 0.5, -0.02], [high, 0.5, -0.02], [MAST, 9.0, -0.02]]))
        tall = (start + np.where(np.isfinite(t), t, 0)[..., None] * ray)[..., 1] < 4.5
        lay(np.where(tall, t, np.inf), np.broadcast_to([0.32, 0.20, 0.12], ray.shape))
    return distance, colour


def sea(start: Array, ray: Array) -> Array:
    """The colour of the sea: it mirrors sky and boat in its waves, and is green where one looks into it."""
    t = -start[..., 1] / np.minimum(ray[..., 1], -1e-3)
    at = start + t[..., None] * ray
    x, z = at[..., 0], at[..., 2]
    calm = 1 / (1 + 0.05 * t)

    def height(x: Array, z: Array) -> Array:
        return 0.10 * octaves(x * 1.1, z * 2.2, 5, 11) + 0.03 * np.sin(x * 1.3 + z * 0.7)

    step = 0.02
    slope_x = (height(x + step, z) - height(x, z)) / step * calm
    slope_z = (height(x, z + step) - height(x, z)) / step * calm
    normal = np.stack([-slope_x, np.ones_like(x), -slope_z], -1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    away = ray - 2 * (ray * normal).sum(-1, keepdims=True) * normal
    away[..., 1] = np.abs(away[..., 1])
    hit, tint = boat(at, away)
    mirrored = np.where(np.isfinite(hit)[..., None], tint * 0.8, sky(away))
    fresnel = 0.06 + 0.94 * (1 - np.clip(-(ray * normal).sum(-1), 0, 1)) ** 4
    deep = np.array([0.03, 0.20, 0.25]) + np.array([0.02, 0.10, 0.08]) * np.clip(slope_x, -1, 1)[..., None]
    colour = deep + (mirrored - deep) * fresnel[..., None]
    foam = np.clip(octaves(x * 5, z * 9, 3, 23) - 0.45, 0, 1) * np.exp(-((np.abs(z) - 0.75) ** 2) * 6 - (x / 2.3) ** 4)
    haze = np.clip(t / 220, 0, 1)[..., None] ** 1.2
    colour = colour + foam[..., None] * 1.6
    return colour + (np.array([0.93, 0.78, 0.65]) - colour) * haze


def main() -> None:
    """Trace the picture and write boat.jpg beside this file."""
    side = SIDE * SAMPLES
    v, u = np.mgrid[0:side, 0:side].astype(np.float64) / side
    ray = np.stack([(u - 0.5) * 0.66, (0.5 - v) * 0.66 + 0.085, np.ones_like(u)], -1)
    ray /= np.linalg.norm(ray, axis=-1, keepdims=True)
    start = np.broadcast_to(EYE, ray.shape)
    hit, tint = boat(start, ray)
    ground = np.where(ray[..., 1] < -1e-3, EYE[1] / np.maximum(-ray[..., 1], 1e-3), np.inf)
    colour = np.where(np.isfinite(ground)[..., None], sea(start, ray), sky(ray))
    colour = np.where((hit < ground)[..., None], tint, colour)
    colour = np.clip(colour, 0, 1.6)
    colour = (colour / (1 + 0.25 * colour**2)) ** (1 / 1.35)
    small = colour.reshape(SIDE, SAMPLES, SIDE, SAMPLES, 3).mean((1, 3))
    grain = np.random.default_rng(0).normal(0, 0.008, small.shape)
    pixels = (np.clip(small + grain, 0, 1) * 255).round().astype(np.uint8)
    Image.fromarray(pixels).save(Path(__file__).with_name("boat.jpg"), quality=88)


if __name__ == "__main__":
    main()
