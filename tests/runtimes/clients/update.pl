#!/usr/bin/env perl
# Marks a contact's opt-in as the contact's own, with LWP.
use strict;
use warnings;
use LWP::UserAgent;

my $url = ($ENV{API} // 'https://api.constantcontact.com') . '/ws/customers/joesflowers/contacts/1';
my $agent = LWP::UserAgent->new;

sub answer {
    my $request = HTTP::Request->new(@_);
    $request->authorization_basic('APIKEY%joesflowers', 'secret');
    return $agent->request($request);
}

my $contact = answer(GET => $url);
die 'GET: ', $contact->status_line, "\n" unless $contact->is_success;
my $update = $contact->content;
$update =~ s{</EmailAddress>}{</EmailAddress><OptInSource>ACTION_BY_CONTACT</OptInSource>};
my $answer = answer(PUT => $url, ['Content-Type' => 'application/atom+xml'], $update);
print $answer->code, ' ', $answer->header('optin-proxy') // '', "\n";
exit($answer->code == 204 ? 0 : 1);
