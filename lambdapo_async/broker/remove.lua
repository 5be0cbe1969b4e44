-- Delete entries whose effect is durable; an entry that is gone already changes nothing.
-- KEYS[1] = state, KEYS[2] = queue, KEYS[3...] = payloads
-- ARGV[1] = fence, ARGV[2...] = stream ids of the same groups, in the same order
local freed = 0
for i = 3, #KEYS do
  if redis.call('XDEL', KEYS[2], ARGV[i - 1]) == 1 then
    freed = freed + redis.call('STRLEN', KEYS[i])
    redis.call('UNLINK', KEYS[i])
  end
end
if freed > 0 then redis.call('HINCRBY', KEYS[1], 'bytes', -freed) end
return {'OK', freed}
