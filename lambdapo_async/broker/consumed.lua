-- Raise the number of training groups that are done with; the gate opens for as many.
-- KEYS[1] = state
-- ARGV[1] = fence, ARGV[2] = consumed
if tonumber(redis.call('HGET', KEYS[1], 'consumed') or '0') < tonumber(ARGV[2]) then
  redis.call('HSET', KEYS[1], 'consumed', ARGV[2])
end
return {'OK'}
