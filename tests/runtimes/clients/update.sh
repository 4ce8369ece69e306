#!/usr/bin/env bash
# Marks a contact's opt-in as the contact's own, with curl.
set -euo pipefail

url="${API:-https://api.constantcontact.com}/ws/customers/joesflowers/contacts/1"
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

curl -sS --fail -u 'APIKEY%joesflowers:secret' -o "$tmp/contact.xml" "$url"
sed 's|</EmailAddress>|&<OptInSource>ACTION_BY_CONTACT</OptInSource>|' \
  "$tmp/contact.xml" >"$tmp/update.xml"
status=$(curl -sS -u 'APIKEY%joesflowers:secret' -X PUT -H 'Content-Type: application/atom+xml' \
  --data-binary "@$tmp/update.xml" -o "$tmp/answer" -D "$tmp/headers" -w '%{http_code}' "$url")
# The last answer's headers only: the file begins with those of a proxy's tunnel, if there is one.
value=$(tr -d '\r' <"$tmp/headers" |
  awk 'tolower($0) ~ /^http\// { v = "" } tolower($1) == "optin-proxy:" { sub(/^[^:]*: */, ""); v = $0 } END { print v }')
echo "$status $value"
[[ $status == 204 ]]
