"""Dimensions of fixtures and gripper that both the scene builder and the scripted expert must know."""

from __future__ import annotations

# Middle and half lengths of the table, whose top is at height 0.
TABLE_CENTER_M = (0.45, 0.0)
TABLE_HALF_M = (0.4, 0.55)
# Between the open fingers of the arm.
GRIPPER_OPENING_M = 0.08
DRAWER_TRAVEL_M = 0.16
# Half depth, width and height of the smallest drawer that has room for its tray and its handle.
DRAWER_SMALLEST_M = (0.02, 0.03, 0.02)
# Middle of the handle along the drawer's axis, measured from the cabinet's front towards the robot.
DRAWER_HANDLE_X_M = -0.055
DRAWER_HANDLE_HALF_M = (0.007, 0.03, 0.008)
# Thickness of the tray's front, which sticks out of the cabinet.
DRAWER_FRONT_M = 0.012
