from hsmvisord.lanes import lanes

lanes.preload()  # before anything else of the launcher is imported, and uses libcrypto
