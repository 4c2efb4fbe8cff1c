"""A mesh that `up` runs with its dashboard, and a Chromium with a virtual authenticator (WebAuthn, section 11) in front of it."""

import base64
import json
import signal
import subprocess
import time

from conftest import BINARY, ROOT
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

SHOTS = ROOT / "target/screenshots"


def countersign(directory, *arguments, given=None):
    words = [BINARY, "-C", directory, "-o", "json", *arguments]
    return subprocess.run(words, input=given, capture_output=True, text=True, timeout=60)


class Running:
    """A mesh that `up` runs, and the link that it printed."""

    def __init__(self, tmp_path, gate=None, more=""):
        self.directory = tmp_path / "mesh"
        subprocess.run([BINARY, "init", self.directory], check=True, capture_output=True)
        with open(self.directory / "mesh.toml", "a") as mesh:
            mesh.write(more)
        if gate:
            (self.directory / "gate").mkdir()
            (self.directory / "gate/gate.cedar").write_text(gate)
        self.log = tmp_path / "up.log"
        words = [BINARY, "-o", "json", "up", "--no-watch", self.directory]
        self.up = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=open(self.log, "w"), stderr=subprocess.STDOUT)
        end = time.monotonic() + 60
        while not (lines := [line for line in self.log.read_text().splitlines() if '"event":"up"' in line]):
            assert self.up.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)
        self.told = json.loads(lines[0])
        self.origin = self.told["dashboard"]

    def stop(self):
        self.up.send_signal(signal.SIGINT)
        self.up.wait(60)

    def asks(self, name, operator):
        """Changes a policy and applies it; returns what the gate says."""
        policy = self.directory / "policies/greeter.cedar"
        policy.write_text(policy.read_text().replace(policy.read_text().split('@id("')[1].split('"')[0], name))
        answer = countersign(self.directory, "apply", "--operator", operator)
        assert answer.returncode == 3, (answer.returncode, answer.stdout, answer.stderr)
        return json.loads(answer.stdout)

    def revision(self):
        return json.loads(countersign(self.directory, "status").stdout)["revision"]


class Browser:
    """A Chromium of its own, and its authenticator."""

    def __init__(self, tmp_path, name):
        options = webdriver.ChromeOptions()
        for flag in (
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / name}", "--window-size=1280,900",
        ):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        options.binary_location = "/usr/bin/chromium"
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
        self.cdp("WebAuthn.enable", enableUI=False)
        self.authenticator = self.adds_authenticator()

    def cdp(self, command, **arguments):
        return self.driver.execute_cdp_cmd(command, arguments)

    def adds_authenticator(self, **more):
        options = {
            "protocol": "ctap2", "transport": "internal", "hasResidentKey": True, "hasUserVerification": True,
            "isUserVerified": True, "automaticPresenceSimulation": True, **more,
        }
        return self.cdp("WebAuthn.addVirtualAuthenticator", options=options)["authenticatorId"]

    def open(self, url):
        self.driver.get(url)

    def find(self, selector):
        return WebDriverWait(self.driver, 15).until(lambda driver: driver.find_element(By.CSS_SELECTOR, selector))

    def until(self, what):
        return WebDriverWait(self.driver, 15).until(lambda driver: what(driver))

    def text(self):
        # In one step: the page may bring itself up to date between two.
        return self.driver.execute_script("return document.body?.innerText ?? ''")

    def shot(self, name):
        """The page as wide screens and telephones show it, by day and by night."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        for width, scheme in ((1280, "light"), (1280, "dark"), (400, "light"), (400, "dark")):
            self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
            self.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            wide = self.driver.execute_script("return document.documentElement.scrollWidth")
            assert wide <= width, f"{name} is {wide} wide at {width}"
            png = self.cdp("Page.captureScreenshot", captureBeyondViewport=True)["data"]
            (SHOTS / f"{name}-{width}-{scheme}.png").write_bytes(base64.b64decode(png))
        self.cdp("Emulation.clearDeviceMetricsOverride")

    def enrols(self, link, operator):
        self.open(link)
        self.find("[data-do=enroll-key] [name=operator]").send_keys(operator)
        self.find("[data-do=enroll-key] [value=platform]").click()
        self.until(lambda _: "Enrolled" in self.text() or "not good" in self.text())

    def signs_in(self, origin):
        self.open(f"{origin}/sign-in")
        self.find("[data-do=sign-in-key] button").click()
        self.until(lambda driver: "/sign-in" not in driver.current_url)

    def signs(self, url):
        self.open(url)
        self.find("[data-do=change-key] button").click()

    def fetch(self, path, body):
        """Sends JSON as the page's own scripts do, and returns status and answer."""
        script = """
            const [path, body, done] = arguments;
            const csrf = document.querySelector('meta[name="countersign-csrf"]').content;
            fetch(path, { method: "POST", headers: { "content-type": "application/json", "x-countersign-csrf": csrf },
                body: JSON.stringify(body) }).then(async (r) => done([r.status, await r.json()]));
        """
        return self.driver.execute_async_script(script, path, body)

    def signed(self, challenge):
        return self.driver.execute_async_script("const [c, done] = arguments; sign(c).then(done, (e) => done(String(e)))", challenge)

    def complaints(self):
        """What the console says that is no answer of ours."""
        lines = self.driver.get_log("browser")
        return [line["message"] for line in lines if "status of 4" not in line["message"]]

    def quit(self):
        self.driver.quit()
