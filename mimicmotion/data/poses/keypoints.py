"""The keypoint layout every backend fills and every reader uses.

One person is (128, 3): x and y as shares of the picture's width and height, then a confidence, 0 where not found.
Rows 0-17 are OpenPose's body, 18-38 and 39-59 the person's left and right hand, 60-127 the face (68 points).
Body rows: nose, neck, right shoulder, elbow, wrist, left shoulder, elbow, wrist, right hip, knee, ankle, left hip,
knee, ankle, right eye, left eye, right ear, left ear.
"""

NUM_KEYPOINTS = 128
BODY = slice(0, 18)
LEFT_HAND = slice(18, 39)
RIGHT_HAND = slice(39, 60)
FACE = slice(60, 128)
HANDS = (LEFT_HAND, RIGHT_HAND)

NECK = 1
RIGHT_SHOULDER = 2
LEFT_SHOULDER = 5
RIGHT_HIP = 8
LEFT_HIP = 11
TORSO = (RIGHT_SHOULDER, LEFT_SHOULDER, RIGHT_HIP, LEFT_HIP)
HEAD = (0, 14, 15, 16, 17)  # nose, eyes, ears
LIMBS = (3, 4, 6, 7, 9, 10, 12, 13)  # elbows and wrists, knees and ankles

# A point is drawn, counted and fitted from this confidence on, as upstream does.
VISIBLE_CONFIDENCE = 0.3
