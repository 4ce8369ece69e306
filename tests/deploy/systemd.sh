#!/usr/bin/env bash
# Within the container of tests/deploy/systemd.
set -euo pipefail
requests=$((${1:-20000} / 8 * 8)) # of eight clients
export DEBIAN_FRONTEND=noninteractive
fail() {
  echo "FAIL $*"
  systemctl status optin-proxy.service optin-proxy.socket --no-pager || true
  journalctl --no-pager | grep -i optin | tail -n 30 || true
  exit 1
}
is() {
  local said
  said=$(systemctl "$1" "$2" || true)
  [[ $said == "$3" ]] || fail "systemctl $1 $2 says $said, not $3"
}

dpkg -i package.deb
is is-active optin-proxy.service active
is is-active optin-proxy.socket active
is is-enabled optin-proxy.service enabled
is is-enabled optin-proxy.socket enabled
/usr/bin/optin-proxy healthcheck || fail 'not ready after its installation'
[[ $(systemctl show -p MainPID --value optin-proxy.service) -gt 1 ]] || fail 'no process'
user=$(ps -o user= -p "$(systemctl show -p MainPID --value optin-proxy.service)")
[[ $user != root ]] || fail 'it runs as root'
echo "ok installed and ready, as $user"

systemd-analyze security optin-proxy.service --no-pager | tail -n 1
systemd-analyze security optin-proxy.service --threshold=20 --no-pager >/dev/null || fail 'security above 2.0'

optin-proxy simulate --listen 127.0.0.1:8091 >/dev/null 2>&1 &
simulator=$!
sed -i 's|^url = .*|url = "http://127.0.0.1:8091"|' /etc/optin-proxy/proxy.toml
systemctl reload optin-proxy.service
curl -sS --retry 20 --retry-connrefused --retry-delay 0 -o /dev/null http://127.0.0.1:8080/ || fail 'no answer'
for ((i = 0; i < 100; i++)); do
  [[ $(curl -sS http://127.0.0.1:9901/config) != *127.0.0.1:8091* ]] || break
  sleep 0.1
done
((i < 100)) || fail 'the reload changed nothing'
echo 'ok reloaded'

# Under load: reinstalled, which is what an upgrade does, and restarted.
python3 rolling.py 127.0.0.1:8080 "$requests" >rolling.out 2>&1 &
load=$!
replaced=0
while kill -0 "$load" 2>/dev/null; do
  before=$(systemctl show -p MainPID --value optin-proxy.service)
  dpkg -i package.deb >/dev/null
  is is-active optin-proxy.service active
  [[ $(systemctl show -p MainPID --value optin-proxy.service) != "$before" ]] || fail 'the upgrade did not replace the process'
  systemctl restart optin-proxy.service
  ((replaced += 2))
done
wait "$load" || fail "requests were lost: $(cat rolling.out)"
cat rolling.out
((replaced > 0)) || fail 'the load was over before anything was replaced'
echo "ok replaced $replaced times under load"
journalctl --sync
lines=$(journalctl -u optin-proxy.service --no-pager -o cat | grep -c '"message":"request".*"method":"PUT"' || true)
((lines == requests)) || fail "the journal has $lines of $requests requests"
echo 'ok the journal has a line of each request'

grep -q 8091 /etc/optin-proxy/proxy.toml || fail 'the upgrade took the configuration away'
kill -SEGV "$(systemctl show -p MainPID --value optin-proxy.service)"
curl -sS --retry 20 --retry-all-errors --retry-delay 0 -o /dev/null http://127.0.0.1:8080/ || fail 'not served after a crash'
echo 'ok started again after a crash'

echo 'mode = nonsense' >>/etc/optin-proxy/proxy.toml
systemctl restart optin-proxy.service 2>/dev/null && fail 'it started with a broken file'
[[ $(systemctl show -p ExecMainStatus --value optin-proxy.service) == 2 ]] || fail 'not exit status 2'
[[ $(journalctl --no-pager -o cat -n 100) == *'optin-proxy: '*proxy.toml* ]] || fail 'the journal does not name the file'
sed -i '$d' /etc/optin-proxy/proxy.toml
systemctl reset-failed optin-proxy.service
systemctl start optin-proxy.service
is is-active optin-proxy.service active
echo 'ok a broken file keeps it down, says where, and no loop of restarts'

kill "$simulator"
dpkg -r optin-proxy
is is-active optin-proxy.service inactive
is is-active optin-proxy.socket inactive
[[ -e /etc/optin-proxy/proxy.toml ]] || fail 'removal took the configuration'
dpkg -P optin-proxy
[[ ! -e /etc/optin-proxy/proxy.toml && ! -e /usr/bin/optin-proxy ]] || fail 'purge left something'
! systemctl cat optin-proxy.service >/dev/null 2>&1 || fail 'purge left the unit'
echo 'ok removed and purged'
