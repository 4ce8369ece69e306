// Marks a contact's opt-in as the contact's own, with fetch.
const api = process.env.API ?? 'https://api.constantcontact.com';
const url = `${api}/ws/customers/joesflowers/contacts/1`;
const authorization = `Basic ${btoa('APIKEY%joesflowers:secret')}`;

const contact = await fetch(url, { headers: { authorization } });
if (!contact.ok) throw new Error(`GET: ${contact.status}`);
const update = (await contact.text()).replace(
  '</EmailAddress>',
  '</EmailAddress><OptInSource>ACTION_BY_CONTACT</OptInSource>',
);
const answer = await fetch(url, {
  method: 'PUT',
  headers: { authorization, 'content-type': 'application/atom+xml' },
  body: update,
});
console.log(`${answer.status} ${answer.headers.get('optin-proxy') ?? ''}`);
process.exitCode = answer.status === 204 ? 0 : 1;
