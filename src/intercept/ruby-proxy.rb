# Preloaded (RUBYOPT=-r) because Net::HTTP looks up the proxy of an http: URL, so http_proxy,
# even for a connection that will speak TLS.
require 'net/http'

Net::HTTP.prepend(Module.new do
  def proxy_uri
    if use_ssl? && @proxy_uri.nil?
      url = URI::HTTPS.new('https', nil, address, port, nil, nil, nil, nil, nil)
      @proxy_uri = url.find_proxy || false
    end
    super
  end
end)
