"""Start the service, make two pictures with the command line, stop it. Non-zero on any failure."""

import subprocess
import sys
from pathlib import Path

from service import COMMAND, running_service, stop

OUT = Path("out")
PICTURES = {"apple": "a red apple on a blue background", "rocket": "a rocket on a yellow background"}

OUT.mkdir(exist_ok=True)
with running_service() as service:
    print(f"ready at {service.url} after {service.ready_s:.1f} s", flush=True)
    for name, prompt in PICTURES.items():
        generate = [
            COMMAND,
            "generate",
            prompt,
            "--seed",
            "1",
            "--url",
            service.url,
            "-o",
            str(OUT / f"{name}.png"),
        ]
        subprocess.run(generate, check=True)
    again = [COMMAND, "generate", "--recipe", str(OUT / "apple.png"), "--url", service.url, "-o", "out/again.png"]
    subprocess.run(again, check=True)
    code = stop(service.process)
if code != 0:
    sys.exit(f"the service ended with code {code}")
if (OUT / "again.png").read_bytes() != (OUT / "apple.png").read_bytes():
    sys.exit("out/again.png, made from the recipe in out/apple.png, is another picture")
