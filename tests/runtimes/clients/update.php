<?php
// Marks a contact's opt-in as the contact's own, with the curl extension.
$url = (getenv('API') ?: 'https://api.constantcontact.com') . '/ws/customers/joesflowers/contacts/1';
$value = '';
$curl = curl_init($url);
curl_setopt_array($curl, [
    CURLOPT_RETURNTRANSFER => true,
    CURLOPT_USERPWD => 'APIKEY%joesflowers:secret',
    CURLOPT_HEADERFUNCTION => function ($curl, $line) use (&$value) {
        [$name, $rest] = explode(':', $line, 2) + [1 => ''];
        if (strtolower($name) === 'optin-proxy') {
            $value = trim($rest);
        }
        return strlen($line);
    },
]);

$contact = curl_exec($curl);
if ($contact === false || curl_getinfo($curl, CURLINFO_RESPONSE_CODE) !== 200) {
    fwrite(STDERR, 'GET: ' . curl_getinfo($curl, CURLINFO_RESPONSE_CODE) . ' ' . curl_error($curl) . "\n");
    exit(1);
}
$value = '';
curl_setopt_array($curl, [
    CURLOPT_CUSTOMREQUEST => 'PUT',
    CURLOPT_HTTPHEADER => ['Content-Type: application/atom+xml'],
    CURLOPT_POSTFIELDS => str_replace(
        '</EmailAddress>',
        '</EmailAddress><OptInSource>ACTION_BY_CONTACT</OptInSource>',
        $contact
    ),
]);
if (curl_exec($curl) === false) {
    fwrite(STDERR, 'PUT: ' . curl_error($curl) . "\n");
    exit(1);
}
$status = curl_getinfo($curl, CURLINFO_RESPONSE_CODE);
echo "$status $value\n";
exit($status === 204 ? 0 : 1);
