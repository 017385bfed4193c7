"""What every part of the suite shares: the circle, schedules, networks, data, training."""
