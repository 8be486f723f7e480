"""The task of Jordan & Jacobs 1994 regenerated with MuJoCo: forward dynamics of an arm of four joints."""

import numpy as np
from numpy.typing import NDArray

ARM = """
<mujoco>
  <option gravity="0 0 -9.81"><flag contact="disable"/></option>
  <default><joint damping="0.4" armature="0.02"/><geom type="capsule" size="0.05" density="1000"/></default>
  <worldbody>
    <body>
      <joint type="hinge" axis="0 0 1"/><geom fromto="0 0 0 0 0 0.3"/>
      <body pos="0 0 0.3">
        <joint type="hinge" axis="0 1 0"/><geom fromto="0 0 0 0.4 0 0"/>
        <body pos="0.4 0 0">
          <joint type="hinge" axis="0 1 0"/><geom fromto="0 0 0 0.35 0 0"/>
          <body pos="0.35 0 0"><joint type="hinge" axis="1 0 0"/><geom fromto="0 0 0 0.2 0.1 0"/></body>
        </body>
      </body>
    </body>
  </worldbody>
</mujoco>
"""
Floats = NDArray[np.float64]
NUM_TRAIN, NUM_TEST = 15_000, 5_000


def robot_arm(seed: int, num_rows: int = NUM_TRAIN + NUM_TEST) -> tuple[Floats, Floats]:
    """Forward dynamics of a four-joint arm in three dimensions; links pass through each other.

    Shapes: (num_rows, 12) angles (rad), speeds (rad/s), torques (N m); (num_rows, 4) accelerations (rad/s^2).
    The paper gives neither lengths, masses nor ranges: only ratios between models can be compared with it.
    """
    import mujoco  # a dev dependency of this benchmark alone

    model = mujoco.MjModel.from_xml_string(ARM)
    state = mujoco.MjData(model)
    random = np.random.default_rng(seed)
    angle, speed = random.uniform(-np.pi / 2, np.pi / 2, (num_rows, 4)), random.uniform(-2, 2, (num_rows, 4))
    torque = random.uniform(-1, 1, (num_rows, 4)) * (20, 20, 10, 2)
    acceleration = np.empty((num_rows, 4))
    for row in range(num_rows):
        state.qpos[:], state.qvel[:], state.qfrc_applied[:] = angle[row], speed[row], torque[row]
        mujoco.mj_forward(model, state)
        acceleration[row] = state.qacc
    return np.hstack([angle, speed, torque]), acceleration
