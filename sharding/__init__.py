"""Devices: meshes, rules and the schedules over them. Knows monoids, knows no layer."""
