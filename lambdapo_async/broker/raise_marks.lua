-- Raise (never lower) what is accepted and committed per producer.
-- KEYS[1] = state, KEYS[2] = accepted, KEYS[3] = committed
-- ARGV[1] = fence, ARGV[2...] = producer, mark, ...
for i = 2, #ARGV, 2 do
  local producer, mark = ARGV[i], tonumber(ARGV[i + 1])
  for key = 2, 3 do
    if tonumber(redis.call('HGET', KEYS[key], producer) or '0') < mark then
      redis.call('HSET', KEYS[key], producer, mark)
    end
  end
end
return {'OK'}
