# Marks a contact's opt-in as the contact's own, with Net::HTTP.
require 'net/http'

uri = URI("#{ENV.fetch('API', 'https://api.constantcontact.com')}/ws/customers/joesflowers/contacts/1")

answer = Net::HTTP.start(uri.host, uri.port, use_ssl: uri.scheme == 'https') do |http|
  get = Net::HTTP::Get.new(uri)
  get.basic_auth('APIKEY%joesflowers', 'secret')
  contact = http.request(get)
  contact.value # raises unless it is a success

  put = Net::HTTP::Put.new(uri, 'Content-Type' => 'application/atom+xml')
  put.basic_auth('APIKEY%joesflowers', 'secret')
  put.body = contact.body.sub(
    '</EmailAddress>', '</EmailAddress><OptInSource>ACTION_BY_CONTACT</OptInSource>'
  )
  http.request(put)
end
puts "#{answer.code} #{answer['optin-proxy']}"
exit(answer.code == '204')
