"""A real Envoy with the configurations of deploy/envoy: check.py OPTIN_PROXY ENVOY [--figures]

The files are taken as they are, but for addresses, and for TLS to the API, whose place an origin here takes.
"""

import gzip
import http.client
import http.server
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import threading

import yaml

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))
from waiting import free_port, until

PROGRAM, ENVOY = sys.argv[1:3]
DEPLOY = pathlib.Path(__file__).parents[2] / "deploy" / "envoy"
PATH = "/ws/customers/joesflowers/contacts/7"
REFUSAL = (b"Error 400: Update failed: Existing person 1:2 has an invalid state: Status transition from O to S is not "
           b"allowed when action by owner and confirm opt in is off")
CONTACT, CUSTOMER = b"ACTION_BY_CONTACT", b"ACTION_BY_CUSTOMER"


def body(size, listed=CUSTOMER):
    """An update of about so many bytes, whose lists say this."""
    head = (b"<entry xmlns='http://www.w3.org/2005/Atom'><content><Contact xmlns='http://ws.constantcontact.com/ns/1.0/'>"
            b"<EmailAddress>jane.roe@example.org</EmailAddress><OptInSource>" + CONTACT + b"</OptInSource><ContactLists>")
    one = b"<ContactList id='http://api.constantcontact.com/ws/customers/joesflowers/lists/1'><OptInSource>" + listed + b"</OptInSource></ContactList>"
    tail = b"</ContactLists><Note>%s</Note></Contact></content></entry>"
    filler = b"x" * max(0, size - len(head) - 8 * len(one) - len(tail))
    return head + 8 * one + tail % filler


class Origin(http.server.ThreadingHTTPServer):
    """Remembers what it got. Refuses the first attempt of who says so."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        self.got, self.lock = {}, threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_PUT(self):
                if "chunked" in self.headers.get("Transfer-Encoding", ""):
                    content = b""
                    while size := int(self.rfile.readline(), 16):
                        content += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    content = self.rfile.read(int(self.headers["Content-Length"]))
                number = self.headers["X-Number"]
                with self.server.lock:
                    attempts = self.server.got.setdefault(number, [])
                    attempts.append((content, self.headers))
                    first = len(attempts) == 1
                if first and self.headers.get("X-Refuse"):
                    self.answer(400, REFUSAL)
                else:
                    self.answer(204)

            def do_GET(self):
                self.answer(200, b"feed")

            def answer(self, status, content=b""):
                self.send_response(status)
                if status != 204:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Program:
    """optin-proxy, until it is told to stop."""

    def __init__(self, *arguments):
        self.log = tempfile.TemporaryFile()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OPTIN_PROXY_")}
        self.process = subprocess.Popen([PROGRAM, *arguments, "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"],
                                        stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment)
        ports = [int(re.search(r":(\d+)", self.process.stdout.readline()).group(1)) for _ in range(2)]
        self.port, self.admin = ports

    def metric(self, series):
        connection = http.client.HTTPConnection("127.0.0.1", self.admin)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(series + " ")), 0.0)

    def stop(self):
        self.process.terminate()
        assert self.process.wait(30) == 0
        self.log.seek(0)
        log = self.log.read()
        assert b"(e-mail address)" in log or b"mismatch" not in log
        for planted in (b"jane.roe", b"example.org", b"cGxhbnRlZA"):
            assert planted not in log, planted
        return log


class Envoy:
    """Envoy with one of the files, its addresses changed to these."""

    def __init__(self, name, ports, change=lambda text: text, workers=2):
        self.port = free_port()
        config = yaml.safe_load(change((DEPLOY / name).read_text()))
        resources = config["static_resources"]
        resources["listeners"][0]["address"]["socket_address"]["port_value"] = self.port
        for cluster in resources["clusters"]:
            cluster.pop("transport_socket", None)
            address = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]
            address.update(address="127.0.0.1", port_value=ports[cluster["name"]])
        self.file = tempfile.NamedTemporaryFile("w", suffix=".json")
        json.dump(config, self.file)
        self.file.flush()
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen([ENVOY, "-c", self.file.name, "--concurrency", str(workers), "-l", "warning",
                                         "--use-dynamic-base-id"], stdout=self.log, stderr=self.log)
        until(self.is_up)

    def is_up(self):
        assert self.process.poll() is None, self.log.seek(0) or self.log.read().decode()
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self):
        self.process.terminate()
        self.process.wait(30)


class Wire:
    """Stands before a port, and remembers what is sent to it."""

    def __init__(self, port):
        self.sent, self.behind = bytearray(), port
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            client, _ = self.listener.accept()
            server = socket.create_connection(("127.0.0.1", self.behind))
            for source, sink, seen in ((client, server, self.sent), (server, client, bytearray())):
                threading.Thread(target=self.copy, args=(source, sink, seen), daemon=True).start()

    @staticmethod
    def copy(source, sink, seen):
        try:
            while content := source.recv(65536):
                seen += content
                sink.sendall(content)
        except OSError:
            pass
        sink.close()


def put(connection, number, content, chunked=False, **fields):
    headers = {"X-Number": str(number), "Content-Type": "application/atom+xml", "Authorization": "Basic cGxhbnRlZA==",
               "User-Agent": "check (jane.roe@example.org)"}
    headers.update({name.replace("_", "-"): value for name, value in fields.items()})
    connection.request("PUT", PATH, iter([content]) if chunked else content, headers, encode_chunked=chunked)
    answer = connection.getresponse()
    text = answer.read()
    return answer.status, answer.getheader("optin-proxy"), text


def client(envoy):
    return http.client.HTTPConnection("127.0.0.1", envoy.port, timeout=60)


def aligned(content):
    return content.replace(CUSTOMER, CONTACT)


def load(envoy, start, count, refuse_every=0):
    """So many updates by eight clients: the numbers and bodies of those that were answered with 204."""
    well, lock = {}, threading.Lock()

    def work(first):
        connection = client(envoy)
        for number in range(start + first, start + count, 8):
            content = body(1000 + number * 37 % 60_000, (CUSTOMER, CONTACT)[number % 3 == 0])
            fields = {"X_Refuse": "1"} if refuse_every and number % refuse_every == 0 else {}
            status, _, text = put(connection, number, content, **fields)
            with lock:
                well[number] = content if status == 204 else (status, text)

    workers = [threading.Thread(target=work, args=(first,)) for first in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(well) == count
    return well


def check_ext_proc(origin):
    processor = Program("ext-proc")
    ports = {"api": origin.server_port, "optin-proxy": processor.port}
    envoy = Envoy("ext-proc.yaml", ports)
    connection = client(envoy)
    for size in (1_000, 3_400, 64_000, 256_000, 1_048_000):
        content = body(size)
        status, report, _ = put(connection, size, content, Content_MD5="x", Digest="sha-256=x")
        assert (status, report) == (204, "findings=8, rewritten=8, attempts=1, outcome=rewritten"), (status, report)
        ((got, headers),) = origin.got[str(size)]
        assert got == aligned(content), f"{size}: {len(got)}"
        assert headers.get_all("Content-Length") == [str(len(got))] and headers["Digest"] is None and headers["Content-MD5"] is None
    clean = body(3_000, CONTACT)
    assert put(connection, "clean", clean, Digest="sha-256=x")[1].endswith("outcome=clean")
    assert origin.got["clean"][0][0] == clean and origin.got["clean"][0][1]["Digest"] == "sha-256=x"
    # Whatever a field decides, that field has reached the processor.
    packed = gzip.compress(body(2_000))
    assert put(connection, "packed", packed, Content_Encoding="gzip")[1].endswith("outcome=rewritten")
    assert gzip.decompress(origin.got["packed"][0][0]) == aligned(body(2_000))
    own = body(2_000, CONTACT).replace(b"api.constantcontact.com", f"127.0.0.1:{envoy.port}".encode())
    assert put(connection, "own ids", own)[1].endswith("outcome=rewritten")
    assert origin.got["own ids"][0][0] == body(2_000, CONTACT)
    wide = body(2_000)
    assert put(connection, "wide", wide, Content_Type="application/atom+xml; charset=UTF-16")[1].endswith("outcome=uninspected")
    trace = "0af7651916cd43dd8448eb211c80319c"
    assert put(connection, "traced", body(2_000), Traceparent=f"00-{trace}-b7ad6b7169203331-01")[0] == 204
    assert put(connection, "chunked", body(5_000), chunked=True)[0] == 204
    assert origin.got["chunked"][0][0] == aligned(body(5_000))
    connection.request("GET", "/ws/customers/joesflowers/contacts")
    assert connection.getresponse().read() == b"feed"
    # Too long to be asked about, and said to be so: it passes as it came.
    assert put(connection, "long", body(3_000_000))[1].endswith("outcome=uninspected")
    assert origin.got["long"][0][0] == body(3_000_000)
    for number in range(10):
        name = f"unannounced {number}"
        assert put(client(envoy), name, body(3_000_000), chunked=True)[1].endswith("outcome=uninspected")
        assert origin.got[name][0][0] == body(3_000_000)
    for number, content in load(envoy, 10_000, 2_000).items():
        assert [got for got, _ in origin.got[str(number)]] == [aligned(content)], number
    assert processor.metric('optin_proxy_contact_writes_total{outcome="rewritten"}') > 1_300
    envoy.stop()

    # Credentials do not leave Envoy.
    ports["optin-proxy"] = (wire := Wire(processor.port)).port
    envoy = Envoy("ext-proc.yaml", ports)
    assert put(client(envoy), "overheard", body(2_000))[0] == 204
    assert b"check (jane.roe@example.org)" in wire.sent and CUSTOMER in wire.sent
    assert b"cGxhbnRlZA" not in wire.sent and b"authorization" not in wire.sent
    envoy.stop()

    # A refusal of the proxy's own, where it is to refuse.
    assert trace.encode() in processor.stop()
    processor = Program("ext-proc", "--set", "sanitize.uninspectable=reject")
    ports["optin-proxy"] = processor.port
    envoy = Envoy("ext-proc.yaml", ports)
    status, _, text = put(client(envoy), "refused", b"<!DOCTYPE a><Contact/>")
    assert (status, json.loads(text)["status"]) == (415, 415), (status, text)
    assert "refused" not in origin.got

    # Away: open by default, closed if so set.
    processor.stop()
    assert put(client(envoy), "open", body(2_000))[:2] == (204, None)
    assert origin.got["open"][0][0] == body(2_000)
    envoy.stop()
    envoy = Envoy("ext-proc.yaml", ports, lambda text: text.replace("failure_mode_allow: true", "failure_mode_allow: false"))
    assert put(client(envoy), "closed", body(2_000))[0] >= 500
    assert "closed" not in origin.got
    envoy.stop()

    # Watching only: nothing is changed, and all is counted.
    processor = Program("ext-proc")
    ports["optin-proxy"] = processor.port
    watching = lambda text: text.replace("request_body_mode: NONE", "request_body_mode: STREAMED").replace(
        "allow_mode_override: true", "observability_mode: true")
    envoy = Envoy("ext-proc.yaml", ports, watching)
    assert put(client(envoy), "watched", body(2_000))[0] == 204
    assert origin.got["watched"][0][0] == body(2_000)
    until(lambda: processor.metric('optin_proxy_contact_writes_total{outcome="observed"}') == 1)
    envoy.stop()
    processor.stop()


def check_serve_hop(origin):
    proxy = Program("serve", "--upstream", f"http://127.0.0.1:{origin.server_port}", "--set", "retry.budget=1.0",
                    "--set", "retry.base_delay=5ms")
    envoy = Envoy("serve-hop.yaml", {"optin-proxy": proxy.port})
    for number, content in load(envoy, 50_000, 2_000, refuse_every=10).items():
        attempts = [got for got, _ in origin.got[str(number)]]
        assert attempts == [aligned(content)] * (2 if number % 10 == 0 else 1), number
    assert proxy.metric('optin_proxy_retries_total{outcome="rescued"}') == 200
    envoy.stop()
    proxy.stop()


def cpu(process):
    fields = pathlib.Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def figures(origin):
    """CPU time of each program for an update of 3.4 KB with eight edits, from one run."""
    processor = Program("ext-proc", "--set", "log.level=error")
    ports = {"api": origin.server_port, "optin-proxy": processor.port}
    # From the filter's entry to the next one's.
    without = lambda text: re.sub(r" *- name: envoy\.filters\.http\.ext_proc\n.*?(?= *- name: envoy\.filters\.http\.router)",
                                  "", text, flags=re.S)
    for name, change in (("ext-proc", lambda text: text), ("plain", without)):
        envoy = Envoy("ext-proc.yaml", ports, change, workers=1)
        content, count, clients = body(3_400), 10_000, 16

        def work(requests):
            connection = client(envoy)
            for _ in range(requests):
                assert put(connection, "measured", content)[0] == 204
                origin.got.clear()

        work(500)
        before = cpu(processor.process), cpu(envoy.process)
        workers = [threading.Thread(target=work, args=(count // clients,)) for _ in range(clients)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        after = cpu(processor.process), cpu(envoy.process)
        ours, theirs = ((late - early) / count * 1e6 for early, late in zip(before, after))
        print(f"{name}: optin-proxy {ours:.0f} us, Envoy {theirs:.0f} us a request")
        envoy.stop()
    processor.stop()


if __name__ == "__main__":
    if "--figures" in sys.argv:
        figures(Origin())
    else:
        check_ext_proc(Origin())
        check_serve_hop(Origin())
        print("Envoy: rewrite by ext_proc and the hop through serve work")
