"""The proxies that are held beside each other, with one worker each, and the origin behind them."""

import pathlib
import re
import signal
import socket
import subprocess
import tempfile
import time

PROXY_CORE, OTHER_CORE = "0", "1"
FOLDER = pathlib.Path(tempfile.mkdtemp(prefix="load-"))
FOLDER.chmod(0o755)
CERTIFICATE, KEY, PAIR = (FOLDER / name for name in ("certificate.pem", "key.pem", "pair.pem"))

NGINX = """
{modules}
worker_processes 1; daemon off; error_log {folder}/{name}.err error; pid {folder}/{name}.pid;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_body_temp_path {folder}/{name}.b; proxy_temp_path {folder}/{name}.p; client_max_body_size 0;
  fastcgi_temp_path {folder}/{name}.f; uwsgi_temp_path {folder}/{name}.u; scgi_temp_path {folder}/{name}.s;
  client_body_buffer_size 512k; keepalive_requests 1000000000; ssl_certificate {folder}/certificate.pem; ssl_certificate_key {folder}/key.pem;
  upstream origin {{ server 127.0.0.1:{origin}; keepalive 128; keepalive_requests 1000000000; }}
  server {{ listen 127.0.0.1:{port} backlog=4096 {tls}; {server} }}
}}
"""
PASS = "proxy_pass {scheme}://origin; proxy_http_version 1.1; proxy_set_header Connection ''; proxy_set_header Host api;"
TLS_PASS = ("proxy_ssl_verify on; proxy_ssl_name localhost; proxy_ssl_server_name on; "
            f"proxy_ssl_trusted_certificate {CERTIFICATE}; ") + PASS
# Long bodies are not to be written to the disk.
STREAM = ("location /up {{ proxy_request_buffering off; {0} }} location /large {{ proxy_max_temp_file_size 0; {0} }}"
          .format(PASS.format(scheme="http")))

# Reads a body, as an API does, before it answers.
READ = """
content_by_lua_block {
  local socket, left = ngx.req.socket(), tonumber(ngx.var.content_length)
  while left > 0 do left = left - #assert(socket:receive(math.min(left, 1048576))) end
  ngx.exit(204)
}
"""
# Refuses each request once.
REFUSE = """
content_by_lua_block {
  ngx.req.discard_body()
  package.loaded.seen = package.loaded.seen or {}
  local seen, id = package.loaded.seen, ngx.var.http_x_request_id
  if seen[id] then
    seen[id] = nil
    return ngx.exit(204)
  end
  seen[id] = true
  ngx.status = 400
  ngx.print("Error 400: Status transition from O to S is not allowed when action by owner and confirm opt in is off")
}
"""
# The least that does the rewrite: it reads the declaration and sets the lists to it.
EDIT = """
  if text and text:find("<OptInSource>ACTION_BY_CONTACT</OptInSource>", 1, true) then
    local edited, n = ngx.re.gsub(text, "(<ContactList id[^>]*>\\\\s*<OptInSource>)ACTION_BY_CUSTOMER", "$1ACTION_BY_CONTACT", "jo")
    if n > 0 then text = edited end
  end
"""
REWRITE = """
rewrite_by_lua_block {
  if ngx.req.get_method() ~= "PUT" then return end
  ngx.req.read_body()
  local text = ngx.req.get_body_data()
""" + EDIT + """
  if text then ngx.req.set_body_data(text) end
}
"""
# The rewrite, and one more attempt.
RETRY = """
location /ws/customers/refused/ { content_by_lua_block {
  ngx.req.read_body()
  local text = ngx.req.get_body_data()
""" + EDIT + """
  local answer
  for _ = 1, 2 do
    answer = ngx.location.capture("/again" .. ngx.var.uri, { method = ngx.HTTP_PUT, body = text })
    if answer.status ~= 400 or not answer.body:find("Status transition", 1, true) then break end
  end
  ngx.status = answer.status
  ngx.print(answer.body)
} }
location /again/ { internal; rewrite ^/again(.*) $1 break; """ + PASS.format(scheme="http") + " }\n"

HAPROXY = """
global
  nbthread 1
  maxconn 8192
  {globally}
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
  http-reuse always
listen proxy
  bind 127.0.0.1:{port} {tls}
  {rules}
  server origin 127.0.0.1:{origin} {server}
"""
# The rewrite, and one more attempt. Lua cannot edit a body on its way, so it sends a request of its own.
HAPROXY_LUA = """
core.register_service("rewrite", "http", function(applet)
  local text, headers = applet:receive(), {}
  if text:find("<OptInSource>ACTION_BY_CONTACT</OptInSource>", 1, true) then
    text = text:gsub("(<ContactList id[^>]*>%%s*<OptInSource>)ACTION_BY_CUSTOMER", "%%1ACTION_BY_CONTACT")
  end
  for name, values in pairs(applet.headers) do
    if name ~= "content-length" and name ~= "host" then
      headers[name] = {}
      for index, value in pairs(values) do headers[name][index + 1] = value end
    end
  end
  local answer
  for _ = 1, 2 do
    answer = core.httpclient():put{url = "http://127.0.0.1:%d" .. applet.path, headers = headers, body = text}
    if answer.status ~= 400 or not (answer.body or ""):find("Status transition", 1, true) then break end
  end
  applet:set_status(answer.status)
  applet:start_response()
  applet:send(answer.body or "")
end)
"""


# The same edit for mitmproxy, which sends what it has edited.
MITMPROXY = """
import re
def request(flow):
    text = flow.request.content
    if text and b"<OptInSource>ACTION_BY_CONTACT</OptInSource>" in text:
        flow.request.content = re.sub(rb"(<ContactList id[^>]*>\\s*<OptInSource>)ACTION_BY_CUSTOMER", rb"\\1ACTION_BY_CONTACT", text)
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def make_certificate():
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
                    "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=CA:FALSE",
                    "-keyout", KEY, "-out", CERTIFICATE], check=True, stderr=subprocess.DEVNULL)
    PAIR.write_text(CERTIFICATE.read_text() + KEY.read_text())


class Server:
    def __init__(self, name, core, port, arguments):
        self.name, self.port = name, port
        self.process = subprocess.Popen(["taskset", "-c", core, *map(str, arguments)], stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        end = time.monotonic() + 10
        while True:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    return
            assert time.monotonic() < end and self.process.poll() is None, f"{name} does not start"
            time.sleep(0.05)

    def processes(self):
        children = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True).stdout.split()
        return [self.process.pid, *map(int, children)]

    def cpu(self):
        """In seconds, of all its threads."""
        total = 0
        for pid in self.processes():
            for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
                total += int((task / "schedstat").read_text().split()[0])
        return total / 1e9

    def ticks(self):
        """CPU time in the kernel and in all, by its ticks: good for a share of what `cpu` tells exactly. Of some
        hundreds a round, and what else a process has done weighs in."""
        fields = [pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in self.processes()]
        own, kernel = (sum(int(field[at]) for field in fields) for at in (11, 12))
        return kernel, own + kernel

    def memory(self):
        """The most that was resident, in MB."""
        status = "".join(pathlib.Path(f"/proc/{pid}/status").read_text() for pid in self.processes())
        return sum(int(size) for size in re.findall(r"VmHWM:\s+(\d+)", status)) / 1024

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(15)


def nginx(name, core, origin, server, lua=False, tls="", port=None):
    port = port or free_port()
    modules = "\n".join(f"load_module /usr/lib/nginx/modules/{it}.so;" for it in ("ndk_http_module", "ngx_http_lua_module")) if lua else ""
    unique = f"{name}-{port}"
    text = NGINX.format(name=unique, folder=FOLDER, origin=origin, port=port, server=server, modules=modules, tls=tls)
    (FOLDER / f"{unique}.conf").write_text(text)
    return Server(name, core, port, ["nginx", "-c", FOLDER / f"{unique}.conf", "-p", FOLDER])


def haproxy(name, origin, globally="", tls="", rules="", server=""):
    port = free_port()
    file = FOLDER / f"haproxy-{port}.cfg"
    file.write_text(HAPROXY.format(port=port, origin=origin, globally=globally, tls=tls, rules=rules, server=server))
    return Server(name, PROXY_CORE, port, ["haproxy", "-f", file])


# No wait between two attempts, as the others have none, and no limit of their share.
AT_ONCE = ("retry.base_delay=0ms", "retry.max_delay=0ms", "retry.budget=1", "retry.budget_floor=100000")


def optin_proxy(program, upstream, *settings):
    port = free_port()
    settings = ("log.level=error", "limits.max_connections=20000", *settings)
    arguments = [program, "serve", "--listen", f"127.0.0.1:{port}", "--upstream", upstream, "--admin", "127.0.0.1:0",
                 *(part for setting in settings for part in ("--set", setting))]
    return Server("optin-proxy", PROXY_CORE, port, arguments)


def floor(what, origin, program):
    """What optin-proxy stands on, the least that does its work, on that and without, that and all that is asked of it, and what any proxy does."""
    port = free_port()
    return Server(what, PROXY_CORE, port, [program, what, f"127.0.0.1:{port}", f"127.0.0.1:{origin}"])


class Intercepting(Server):
    """optin-proxy as HTTPS_PROXY. The load generator knows no CONNECT, so something beside it says that."""

    def __init__(self, program, upstream, *settings):
        inner = optin_proxy(program, upstream, f"intercept.ca_dir={FOLDER}/ca", *settings)
        self.name, self.process, self.port = inner.name, inner.process, free_port()
        self.connector = subprocess.Popen(["taskset", "-c", OTHER_CORE, "socat", f"TCP-LISTEN:{self.port},fork,reuseaddr,backlog=1024",
                                           f"PROXY:127.0.0.1:api.constantcontact.com:443,proxyport={inner.port}"],
                                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def stop(self):
        self.connector.terminate()
        self.connector.wait(15)
        super().stop()


def the_origin():
    tls = free_port()
    server = (f"listen 127.0.0.1:{tls} ssl backlog=4096; root {FOLDER}; location /ws/ {{ return 204; }} "
              f"location /ws/customers/refused/ {{ {REFUSE} }} location /up {{ {READ} }}")
    return nginx("origin", OTHER_CORE, 9, server, lua=True), tls


def over_http(program, floors, origin):
    """Requests over TCP on both sides."""
    lua = FOLDER / "rewrite.lua"
    lua.write_text(HAPROXY_LUA % origin)
    location = "location / {{ {} {} }}".format
    plain = PASS.format(scheme="http")
    return [
        nginx("nginx", PROXY_CORE, origin, location("", plain) + STREAM),
        nginx("nginx+Lua", PROXY_CORE, origin, location(REWRITE, plain) + RETRY + STREAM, lua=True),
        haproxy("HAProxy", origin),
        haproxy("HAProxy+Lua", origin, f"tune.bufsize 524288\n  lua-load {lua}",
                rules="option http-buffer-request\n  http-request use-service lua.rewrite if METH_PUT"),
        optin_proxy(program, f"http://127.0.0.1:{origin}", *AT_ONCE),
        floor("hyper", origin, floors),
        floor("hyper+rewrite", origin, floors),
        floor("hyper+watched", origin, floors),
        floor("httparse+rewrite", origin, floors),
        floor("httparse+watched", origin, floors),
        # Of each client's connection it makes one to the origin.
        floor("relay", origin, floors),
    ]


def beside_a_script(program, floors, origin):
    """What one would write first: an addon for mitmproxy. And how much less any proxy of these libraries takes."""
    addon, port = FOLDER / "addon.py", free_port()
    addon.write_text(MITMPROXY)
    script = ["mitmdump", "--quiet", "--mode", f"reverse:http://127.0.0.1:{origin}", "--listen-host", "127.0.0.1", "--listen-port", port,
              "--set", f"confdir={FOLDER}/mitmproxy", "--scripts", addon]
    return [
        nginx("nginx", PROXY_CORE, origin, "location / { %s }" % PASS.format(scheme="http")),
        optin_proxy(program, f"http://127.0.0.1:{origin}"),
        Server("mitmproxy", PROXY_CORE, port, script),
        floor("hyper", origin, floors),
        floor("hyper+rewrite", origin, floors),
    ]


def over_tls(program, origin, intercepted):
    """Requests over TLS to the origin, and from the client too where they are intercepted."""
    nginx_tls, haproxy_tls = ("ssl", f"ssl crt {PAIR}") if intercepted else ("", "")
    ours = Intercepting if intercepted else optin_proxy
    return [
        nginx("nginx", PROXY_CORE, origin, f"location / {{ {TLS_PASS.format(scheme='https')} }}", tls=nginx_tls),
        haproxy("HAProxy", origin, tls=haproxy_tls, server=f"ssl verify required ca-file {CERTIFICATE} sni str(localhost) verifyhost localhost"),
        ours(program, f"https://localhost:{origin}", f"upstream.ca_file={CERTIFICATE}"),
    ]
