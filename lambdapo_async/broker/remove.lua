-- Delete entries that are durable at the learner; an entry that is gone already changes nothing.
-- KEYS[1] = state, KEYS[2] = queue, KEYS[3...] = payloads
-- ARGV[1] = fence, ARGV[2...] = stream id, 1 for a duplicate training group else 0, ... of the same groups, in order
local freed, duplicates = 0, 0
for i = 3, #KEYS do
  if redis.call('XDEL', KEYS[2], ARGV[2 * i - 4]) == 1 then
    freed = freed + redis.call('STRLEN', KEYS[i])
    duplicates = duplicates + tonumber(ARGV[2 * i - 3])
    redis.call('UNLINK', KEYS[i])
  end
end
if freed > 0 then redis.call('HINCRBY', KEYS[1], 'bytes', -freed) end
if duplicates > 0 then redis.call('HINCRBY', KEYS[1], 'admitted', -duplicates) end
return {'OK', freed}
