import sys, subprocess
subprocess.run(["/bin/bash",sys.argv[1]], stdin=subprocess.DEVNULL)
