"""What stands behind `dcgan_utils`: one file a subject, each importing only from files above it.

config → randomness → arrays → files → data → networks → convolutions → losses → history → sampling → engine → training
→ acceleration → storage → restoring → checkpoints → health → distances → evaluation → plots → callbacks → cockpit
→ recipes → cli
"""
