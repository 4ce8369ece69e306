"""Marks a contact's opt-in as the contact's own, with the standard library alone."""

import base64
import os
import sys
from urllib.error import HTTPError
from urllib.request import Request, urlopen

url = os.environ.get("API", "https://api.constantcontact.com") + "/ws/customers/joesflowers/contacts/1"
headers = {"Authorization": "Basic " + base64.b64encode(b"APIKEY%joesflowers:secret").decode()}

with urlopen(Request(url, headers=headers)) as answer:
    contact = answer.read()
update = contact.replace(
    b"</EmailAddress>", b"</EmailAddress><OptInSource>ACTION_BY_CONTACT</OptInSource>"
)
headers["Content-Type"] = "application/atom+xml"
try:
    answer = urlopen(Request(url, data=update, headers=headers, method="PUT"))
except HTTPError as error:
    answer = error
print(answer.status, answer.headers.get("optin-proxy", ""))
sys.exit(answer.status != 204)
