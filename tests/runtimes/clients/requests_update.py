"""Marks a contact's opt-in as the contact's own, with requests."""

import os
import sys

import requests

url = os.environ.get("API", "https://api.constantcontact.com") + "/ws/customers/joesflowers/contacts/1"
session = requests.Session()
session.auth = ("APIKEY%joesflowers", "secret")

contact = session.get(url)
contact.raise_for_status()
update = contact.content.replace(
    b"</EmailAddress>", b"</EmailAddress><OptInSource>ACTION_BY_CONTACT</OptInSource>"
)
answer = session.put(url, data=update, headers={"Content-Type": "application/atom+xml"})
print(answer.status_code, answer.headers.get("optin-proxy", ""))
sys.exit(answer.status_code != 204)
